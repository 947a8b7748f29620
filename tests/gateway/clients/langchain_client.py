"""Ten turns with LangChain."""

import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import AIMessage
from langchain_openai import ChatOpenAI

url, model = sys.argv[1:]
chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=8)
messages: list = [SystemMessage("You are brief.")]
answers = []
for turn in range(10):
    messages.append(HumanMessage(f"Question {turn}: name a city."))
    if turn % 3 == 1:
        call = {"name": "weather", "args": {"city": "Rome"}, "id": f"call_{turn}", "type": "tool_call"}
        messages.append(AIMessage(content="", tool_calls=[call]))
        messages.append(ToolMessage("sunny", tool_call_id=call["id"]))
    if turn % 2:
        answer = None
        for chunk in chat.stream(messages):
            answer = chunk if answer is None else answer + chunk
    else:
        answer = chat.invoke(messages)
    messages.append(answer)
    answers.append(answer.text if isinstance(answer.text, str) else answer.text())
print(json.dumps(answers))
