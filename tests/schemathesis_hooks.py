"""Makes schemathesis' requests reach the model, and its answers short: it would ask for made-up models and a million tokens."""

import json

import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    if "messages" in body and len(json.dumps(body)) > 3 << 20:
        # Schemathesis does not know that 413 refuses a request too. Without messages it is as wrong.
        body["messages"] = []
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
        if options is None:
            body["options"] = {"num_predict": 2}
        elif isinstance(options, dict) and isinstance(options.get("num_predict", 0) or 0, int):
            # A wrong number must stay wrong, or a request that is to be refused would be right.
            body["options"] = (
                {**options, "num_predict": 2} if -2 <= (options.get("num_predict") or 0) <= 1 << 20 else options
            )
        return
    if "messages" in body and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = 2
