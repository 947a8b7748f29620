"""Makes schemathesis' requests reach the model, and its answers short: it would ask for made-up models and a million tokens."""

import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and body["model"]:
        body["model"] = "smollm2-135m"
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"):
        if isinstance(body.get(name), int) and not isinstance(body[name], bool) and body[name] > 2:
            body[name] = 2
    # Each API has a word of its own for the length.
    if "/responses" in case.path and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = 2
    if case.path == "/api/chat":
        options = body.get("options")
        if options is None or isinstance(options, dict):
            body["options"] = {**(options or {}), "num_predict": 2}
        return
    if "messages" in body and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = 2
