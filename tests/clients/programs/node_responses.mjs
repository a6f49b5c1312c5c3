// The Responses API: OpenAI's client for Node, plain, streamed and stored, and @ai-sdk/openai, plain, streamed, with a
// tool and with a form.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const asked = { model: "llama", input: "Name a colour.", temperature: 0, max_output_tokens: 16 };
const whole = await client.responses.create(asked);
const stream = client.responses.stream(asked);
let deltas = "";
stream.on("response.output_text.delta", (event) => (deltas += event.delta));
const final = await stream.finalResponse();
const kept = await client.responses.retrieve(whole.id);
const next = await client.responses.create({ ...asked, input: "And another?", previous_response_id: whole.id });

const model = createOpenAI({ baseURL: url, apiKey: key }).responses("llama");
const options = { model, prompt: "Name a colour.", temperature: 0, maxOutputTokens: 16, maxRetries: 0 };
const said = await generateText(options);
let streamed = "";
for await (const piece of streamText(options).textStream) streamed += piece;
const schema = z.object({ colour: z.enum(["red", "blue"]) });
const paint = tool({ description: "Paints.", inputSchema: schema, execute: async ({ colour }) => `It is ${colour}.` });
const toolChoice = { type: "tool", toolName: "paint" };
const called = await generateText({ ...options, tools: { paint }, toolChoice, maxOutputTokens: 60 });
const { object } = await generateObject({ ...options, schema, maxOutputTokens: 60 });
console.log(
  JSON.stringify({
    whole: whole.output_text,
    deltas,
    final: final.output_text,
    kept: kept.output_text ?? kept.output[0].content[0].text,
    next: next.output_text,
    previous: next.previous_response_id === whole.id,
    said: said.text,
    streamed,
    called: called.toolCalls[0].input,
    result: called.toolResults[0].output,
    object,
  }),
);
