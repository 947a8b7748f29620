"""Ten turns with LiteLLM."""

import json
import sys

import litellm

url, model = sys.argv[1:]
messages: list = [{"role": "system", "content": "You are brief."}]
answers = []
for turn in range(10):
    messages.append({"role": "user", "content": f"Question {turn}: name a city."})
    if turn % 3 == 1:
        call = {
            "id": f"call_{turn}",
            "type": "function",
            "function": {"name": "weather", "arguments": json.dumps({"city": "Rome"})},
        }
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "name": "weather", "content": "sunny"})
    options = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "messages": messages, "max_tokens": 8}
    if turn % 2:
        chunks = list(litellm.completion(stream=True, **options))
        message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    else:
        message = litellm.completion(**options).choices[0].message
    messages.append(message.model_dump())
    answers.append(message.content)
print(json.dumps(answers))
