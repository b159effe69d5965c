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

const tools = [{ type: "function", function: { name: "find", parameters: { type: "object", properties: {} } } }];
for (const [field, value] of [["tools", tools], ["response_format", { type: "json_object" }]]) {
  await client.chat.completions.create({ model, messages, [field]: value }).catch((error) => {
    assert.equal(error.param, field); // not served yet
  });
}
