"""Ten turns with the official client: what it returns goes back as history, with tool calls between."""

import json
import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none")
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
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": "sunny"})
    if turn % 2:
        stream = client.chat.completions.create(model=model, messages=messages, max_tokens=8, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        messages.append({"role": "assistant", "content": text})
    else:
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=8)
        text = reply.choices[0].message.content
        messages.append(reply.choices[0].message.model_dump())
    answers.append(text)
print(json.dumps(answers))
