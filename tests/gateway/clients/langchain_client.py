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


def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"sunny in {city}"


def population(city: str) -> str:
    """Return how many people live in a city."""
    return f"many in {city}"


# Two tools in turn, each of which must be called.
asked: list = [HumanMessage("Tell me about Rome.")]
for tool in (weather, population):
    bound = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=80, temperature=0).bind_tools(
        [weather, population], tool_choice=tool.__name__, parallel_tool_calls=False
    )
    called = bound.invoke(asked)
    (call,) = called.tool_calls
    assert call["name"] == tool.__name__, call
    asked += [called, ToolMessage(tool(**call["args"]), tool_call_id=call["id"])]
print(json.dumps(answers))
