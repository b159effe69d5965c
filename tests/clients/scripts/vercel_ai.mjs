// Uses Vercel's AI SDK with its provider for servers in OpenAI's form.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const [baseURL, apiKey, task] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "manyhats", baseURL, apiKey, includeUsage: true });
const model = provider.chatModel(task);

const answer = await generateText({ model, prompt: "Say «card arrival»" });
assert.equal(answer.text, "card arrival");
assert.equal(answer.usage.outputTokens, 13);
const messages = [
  { role: "user", content: "Say «card arrival»" },
  ...answer.response.messages,
  { role: "user", content: [{ type: "text", text: "Say «bye»" }] },
];
const more = await generateText({
  model, system: "Be brief.", messages, maxOutputTokens: 32, temperature: 0.5, topP: 0.9, seed: 7, stopSequences: ["\n", "END"],
  presencePenalty: 0.1, frequencyPenalty: 0.1, providerOptions: { manyhats: { user: "customer-1", top_k: 20 } },
});
assert.equal(more.text, "bye");
assert.equal(more.finishReason, "stop");
const stream = streamText({ model, system: "Be brief.", messages, onError: ({ error }) => assert.fail(error) });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, "bye");
assert.equal((await stream.usage).outputTokens, 4);

const completion = await generateText({ model: provider.completionModel(task), prompt: "Say «héllo»", maxOutputTokens: 16 });
assert.equal(completion.text, "héllo");
const pieces = streamText({ model: provider.completionModel(task), prompt: "Say «héllo»", onError: ({ error }) => assert.fail(error) });
assert.equal(await pieces.text, "héllo");

const schema = jsonSchema({ type: "object", properties: { name: { type: "string" } }, required: ["name"] });
const find = tool({ inputSchema: schema, execute: ({ name }) => `Say «${name} is here»` });
const call = 'Say «<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>»';
const found = await generateText({ model, prompt: call, tools: { find }, stopWhen: stepCountIs(2) });
assert.equal(found.text, "Ann is here");
const object = await generateObject({ model, prompt: 'Say «{"name": "Ann"}»', schema });
assert.deepEqual(object.object, { name: "Ann" });
