"""Compiled constraints: what they allow is what their language says, whatever the tokens; errors are sentences."""

import json
import random

import jsonschema_rs
import pytest

from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.models import grammar
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import Constraint, ConstraintKind

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TEXT = '{"name": "Bob", "age": 33, "kind": "cat"}'


@pytest.fixture(scope="module")
def codec(smollm):
    return TextCodec(smollm.folder)


@pytest.fixture(scope="module")
def grammars(smollm):
    return ModelGrammars(smollm.folder, read_shape(smollm.folder).vocab_size)


def start(grammars, codec, source, kind=ConstraintKind.JSON_SCHEMA):
    text = source if isinstance(source, str) else json.dumps(source)
    return grammars.grammar(Constraint(kind, text), codec.stop_tokens).start()


def test_masks_and_questions_about_single_tokens_agree_at_every_place(grammars, codec):
    matcher = start(grammars, codec, PERSON)
    for token in [*codec.encode(TEXT, is_raw=True), codec.stop_tokens[0]]:
        allowed = matcher.allowed()
        assert len(allowed) == grammars.vocab_size
        sample = {token, *codec.stop_tokens, *random.Random(1).sample(range(grammars.vocab_size), 400)}
        assert all(matcher.allows(each) == allowed[each] for each in sample)
        assert matcher.allows(token)
        matcher.advance(token)
    assert matcher.is_over
    assert matcher.allows(5), "nothing binds after the end"


@pytest.mark.parametrize("seed", range(8))
def test_any_walk_within_the_mask_that_ends_has_written_what_the_schema_allows(grammars, codec, seed):
    rng, matcher = random.Random(seed), start(grammars, codec, PERSON)
    written = []
    for _ in range(200):
        allowed = matcher.allowed().nonzero()[0]
        stops = [token for token in codec.stop_tokens if matcher.allows(token)]
        token = stops[0] if stops else int(rng.choice(allowed))
        matcher.advance(token)
        if matcher.is_over:
            break
        written.append(token)
    assert matcher.is_over, "names have at most eight letters, so every walk ends"
    jsonschema_rs.validator_for(PERSON).validate(json.loads(codec.decode(written)))


def test_places_are_copied_and_taken_back_even_past_the_end(grammars, codec):
    tokens = codec.encode(TEXT, is_raw=True)
    matcher = start(grammars, codec, PERSON)
    for token in tokens[:7]:
        matcher.advance(token)
    other = matcher.copy()
    for token in [*tokens[7:], codec.stop_tokens[0], 4, 5]:
        matcher.advance(token)
    assert matcher.is_over
    assert not other.is_over
    matcher.rewind(3)
    assert (matcher.is_over, matcher.forced()) == (False, [codec.stop_tokens[0]])
    matcher.rewind(len(tokens) - 7)
    assert (matcher.allowed() == other.allowed()).all()
    with pytest.raises(RemoteProtocolError, match="one that the constraint allows"):
        matcher.advance(codec.stop_tokens[0])


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        (ConstraintKind.REGEX, r"[0-9]{3}-[a-z]+", "123-abc", "12a"),
        (ConstraintKind.GRAMMAR, 'start: "yes" | "no" ", " /[a-z]+/', "no, never", "maybe"),
        (ConstraintKind.GRAMMAR, 'root ::= "a" | "b" root', "bba", "c"),
    ],
)
def test_other_languages_are_taken(grammars, codec, kind, source, good, bad):
    for text, is_good in ((good, True), (bad, False)):
        matcher = start(grammars, codec, source, kind)
        fits = True
        for token in [*codec.encode(text, is_raw=True), codec.stop_tokens[0]]:
            fits = fits and matcher.allows(token)
            if fits:
                matcher.advance(token)
        assert fits == is_good, text


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        (ConstraintKind.JSON_SCHEMA, "{", "cannot be read"),
        (ConstraintKind.JSON_SCHEMA, "[]", "cannot be"),
        (ConstraintKind.JSON_SCHEMA, '{"$ref": "#/nope"}', "does not exist"),
        (ConstraintKind.REGEX, "(", "cannot be used"),
        (ConstraintKind.GRAMMAR, "start: nothing", "cannot be used"),
    ],
)
def test_a_wrong_constraint_is_refused_in_a_sentence(grammars, codec, kind, source, words):
    with pytest.raises(ConfigError, match=words) as caught:
        start(grammars, codec, source, kind)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_text_that_nothing_can_end_is_refused(grammars):
    with pytest.raises(ConfigError, match="needs a stop token"):
        grammars.grammar(Constraint(ConstraintKind.REGEX, "a"), ()).start()


def test_a_model_without_a_tokenizer_says_so(tiny, codec):
    grammar = ModelGrammars(tiny("llama"), 131).grammar(Constraint(ConstraintKind.REGEX, "a"), (2,))
    with pytest.raises(ConfigError, match="no fast tokenizer"):
        grammar.start()


def test_what_was_tried_is_remembered_but_not_without_bound(smollm, codec, monkeypatch):
    grammars = ModelGrammars(smollm.folder, 49152)
    compiled = []
    try_ = grammar._try
    monkeypatch.setattr(grammar, "_try", lambda each: compiled.append(each) or try_(each))
    monkeypatch.setattr("dsd_p2p.models.grammar._MAX_KEPT", 3)
    for number in (1, 1, 2, 3, 1, 4, 2):
        start(grammars, codec, f"x{{{number}}}", ConstraintKind.REGEX)
    assert [each.source for each in compiled] == ["x{1}", "x{2}", "x{3}", "x{4}", "x{2}"]


def test_tokens_that_the_tokenizer_lacks_are_not_allowed_and_break_nothing(smollm, codec):
    """Embeddings often have more rows than the tokenizer has tokens."""
    padded = ModelGrammars(smollm.folder, 50_000)
    matcher = start(padded, codec, PERSON)
    assert not any(matcher.allows(token) for token in (49_152, 49_999, 60_000))
    allowed = matcher.allowed()
    assert len(allowed) == 50_000
    assert not allowed[49_152:].any()
    assert allowed.any()


def test_sessions_do_not_share_what_they_may_spend(grammars, codec):
    """A copy shares its lexer's limits; what one text spends must not be another's error."""
    for _ in range(3):
        matcher = start(grammars, codec, "a{5000}", ConstraintKind.REGEX)
        for _ in range(40):
            matcher.allowed()
            matcher.advance(codec.encode("a", is_raw=True)[0])


def test_any_grammar_can_be_taken_back(grammars, codec):
    matcher = start(grammars, codec, "start: m\nm[max_tokens=5]: /.*/", ConstraintKind.GRAMMAR)
    tokens = codec.encode("one two three", is_raw=True)
    for token in tokens:
        matcher.advance(token)
    matcher.rewind(2)
    matcher.advance(tokens[-2])
    assert matcher.allowed().any()


def test_rules_that_would_overflow_a_threads_stack_are_refused(grammars, codec):
    rules = "".join(f"r{number}: r{number + 1}\n" for number in range(3000))
    with pytest.raises(ConfigError, match="cannot be used"):
        start(grammars, codec, f'start: r0\n{rules}r3000: "b"\n', ConstraintKind.GRAMMAR)


def test_the_tokenizers_own_end_is_none_unless_the_request_says_so(grammars, codec):
    (end,) = grammars.grammar(Constraint(ConstraintKind.REGEX, "a+"), (5,)).start()._owner.end_tokens
    matcher = grammars.grammar(Constraint(ConstraintKind.REGEX, "a+"), (5,)).start()
    matcher.advance(codec.encode("a", is_raw=True)[0])
    assert (matcher.allows(end), bool(matcher.allowed()[end])) == (False, False)
    assert matcher.allows(5)
