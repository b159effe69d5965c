// Uses OpenAI's client for JavaScript as its README does.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });

const models = [];
for await (const one of client.models.list()) models.push(one.id);
assert.deepEqual(models, ["base", model]);
assert.equal((await client.models.retrieve(model)).id, model);

const completion = await client.completions.create({
  model, prompt: ["Say «one»", "Say «two»"], max_tokens: 16, temperature: 0, seed: 7, n: 2, stop: ["\n"], logprobs: 2,
});
assert.deepEqual(completion.choices.map((choice) => choice.text), ["one", "one", "two", "two"]);
let text = "";
for await (const piece of await client.completions.create({ model, prompt: "Say «héllo 🎩»", stream: true, max_tokens: 32 })) {
  text += piece.choices[0].text;
}
assert.equal(text, "héllo 🎩");

const messages = [{ role: "developer", content: "Be brief." }, { role: "user", content: "Say «card arrival»" }];
const chat = await client.chat.completions.create({ model, messages });
assert.equal(chat.choices[0].message.content, "card arrival");
assert.equal(chat.usage.completion_tokens, 13);
const more = await client.chat.completions.create({
  model,
  messages: [...messages, chat.choices[0].message, { role: "user", content: [{ type: "text", text: "Say «bye»" }] }],
  temperature: 0.5, top_p: 0.9, seed: 7, n: 2, stop: "END", logprobs: true, top_logprobs: 2, max_completion_tokens: 32,
  presence_penalty: 0.1, frequency_penalty: 0.1, store: false, metadata: { team: "a" }, user: "customer-1",
});
assert.deepEqual(more.choices.map((choice) => choice.message.content), ["bye", "bye"]);
text = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  model, messages, stream: true, stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, "card arrival");
assert.equal(usage.completion_tokens, 13);
const runner = client.chat.completions.stream({ model, messages });
assert.equal(await runner.finalContent(), "card arrival");

const call = '<tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call>';
const parameters = { type: "object", properties: { name: { type: "string" } }, required: ["name"] };
const tools = [{ type: "function", function: { name: "find", parameters } }];
const asked = [{ role: "user", content: `Say «${call}»` }];
const { message } = (await client.chat.completions.create({ model, messages: asked, tools })).choices[0];
assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { name: "Ann" });
const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "Say «here»" };
const after = await client.chat.completions.create({ model, messages: [...asked, message, result], tools });
assert.equal(after.choices[0].message.content, "here");
const streamed = client.chat.completions.stream({ model, messages: asked, tools, tool_choice: "required" });
assert.equal((await streamed.finalMessage()).tool_calls[0].function.name, "find");
const find = { ...tools[0].function, parse: JSON.parse, function: ({ name }) => `Say «${name} is here»` };
const run = client.chat.completions.runTools({ model, messages: asked, tools: [{ type: "function", function: find }] });
assert.equal(await run.finalContent(), "Ann is here");

const schema = { name: "customer", strict: true, schema: { ...parameters, additionalProperties: false } };
const ann = 'Say «{"name": "Ann"}»';
const parsed = await client.chat.completions.parse({
  model, messages: [{ role: "user", content: ann }], response_format: { type: "json_schema", json_schema: schema },
});
assert.deepEqual(JSON.parse(parsed.choices[0].message.content), { name: "Ann" });
await client.chat.completions.create({ model, messages, response_format: { type: "json_object" } });

const response = await client.responses.create({ model, instructions: "Be brief.", input: "Say «card arrival»" });
assert.equal(response.output_text, "card arrival");
const form = await client.responses.parse({ model, input: ann, text: { format: { type: "json_schema", ...schema } } });
assert.deepEqual(JSON.parse(form.output_text), { name: "Ann" });
text = "";
for await (const event of await client.responses.create({ model, input: "Say «bye»", stream: true })) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
assert.equal(text, "bye");
const flat = [{ type: "function", ...tools[0].function, strict: false }];
const called = await client.responses.create({ model, input: asked, tools: flat });
assert.deepEqual(JSON.parse(called.output[0].arguments), { name: "Ann" });
const output = { type: "function_call_output", call_id: called.output[0].call_id, output: "Say «here»" };
const told = await client.responses.create({ model, input: [...asked, ...called.output, output], tools: flat });
assert.equal(told.output_text, "here");
text = "";
for await (const event of client.responses.stream({ model, input: asked, tools: flat, tool_choice: "required" })) {
  if (event.type === "response.function_call_arguments.delta") text += event.delta;
}
assert.deepEqual(JSON.parse(text), { name: "Ann" });
const echoed = await client.completions.create({ model, prompt: "a b", echo: true, logprobs: 0, max_tokens: 0 });
assert.equal(echoed.choices[0].text, "a b");
