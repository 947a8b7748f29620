// Ten turns with Vercel's AI SDK.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [url, name] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "dsd", baseURL: url, apiKey: "none" })(name);
const system = "You are brief.";
const messages = [], answers = [];
for (let turn = 0; turn < 10; turn++) {
  messages.push({ role: "user", content: [{ type: "text", text: `Question ${turn}: name a city.` }] });
  if (turn % 3 === 1) {
    const toolCallId = `call_${turn}`, toolName = "weather";
    messages.push({ role: "assistant", content: [{ type: "tool-call", toolCallId, toolName, input: { city: "Rome" } }] });
    messages.push({ role: "tool", content: [{ type: "tool-result", toolCallId, toolName, output: { type: "text", value: "sunny" } }] });
  }
  const options = { model, system, messages, maxOutputTokens: 8, maxRetries: 0 };
  let text = "", response;
  if (turn % 2) {
    const result = streamText({ ...options, onError: ({ error }) => { throw error; } });
    for await (const piece of result.textStream) text += piece;
    response = await result.response;
  } else {
    const result = await generateText(options);
    text = result.text;
    response = result.response;
  }
  messages.push(...response.messages);
  answers.push(text);
}
console.log(JSON.stringify(answers));
