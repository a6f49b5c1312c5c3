// Vercel's AI SDK: tools, plain and streamed, and generateObject. OpenAI's own runTools.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, key] = process.argv.slice(2);
const model = createOpenAI({ baseURL: url, apiKey: key }).chat("llama");
const inputSchema = z.object({ city: z.enum(["Paris", "Rome"]), days: z.int().min(1).max(9) });
const weather = tool({
  description: "The weather of a city.",
  inputSchema,
  execute: async ({ city }) => `Rain in ${city}.`,
});
const asked = {
  model,
  tools: { weather },
  toolChoice: { type: "tool", toolName: "weather" },
  prompt: "How is the weather in Paris tomorrow?",
  temperature: 0,
  maxOutputTokens: 80,
  maxRetries: 0,
};
const said = await generateText(asked);
const stream = streamText(asked);
const streamed = await stream.toolCalls;
const { object } = await generateObject({
  model,
  schema: z.object({ city: z.enum(["Paris", "Rome"]) }),
  prompt: "Which city?",
  temperature: 0,
  maxOutputTokens: 60,
  maxRetries: 0,
});

const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
let given;
const runner = client.chat.completions.runTools(
  {
    model: "llama",
    temperature: 0,
    max_completion_tokens: 60,
    messages: [{ role: "user", content: "How is the weather in Paris tomorrow?" }],
    tool_choice: { type: "function", function: { name: "get_weather" } },
    tools: [
      {
        type: "function",
        function: {
          name: "get_weather",
          parse: JSON.parse,
          function: (parsed) => ((given = parsed), "Rain."),
          parameters: {
            type: "object",
            properties: { city: { enum: ["Paris", "Rome"] } },
            required: ["city"],
            additionalProperties: false,
          },
        },
      },
    ],
  },
  { maxChatCompletions: 2 },
);
await runner.done();
console.log(
  JSON.stringify({
    called: said.toolCalls[0].input,
    result: said.toolResults[0].output,
    streamed: streamed[0].input,
    object,
    given,
  }),
);
