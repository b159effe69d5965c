"use strict";
// Shows openapi.json, and sends requests to this server. The key stays in this page: it goes into a header, never a URL.

const root = location.pathname.replace(/\/docs\/?$/, "");
const at = (id) => document.getElementById(id);

// Make an element. Text is always text: nothing of the document becomes markup.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function headers(more = {}) {
  const sent = { ...more };
  if (at("key").value) sent.Authorization = `Bearer ${at("key").value}`;
  if (at("tenant").value) sent["X-Tenant"] = at("tenant").value;
  return sent;
}

function say(text, isBad = false) {
  at("status").textContent = text;
  at("status").className = isBad ? "bad" : "";
}

async function load() {
  try {
    const answer = await fetch(`${root}/openapi.json`, { headers: headers() });
    const body = await answer.json();
    if (answer.status === 401) return say("This server asks for a key: type it above.", true);
    if (!answer.ok) return say(body.error.message, true);
    say("");
    show(body);
  } catch (error) {
    say(`The document did not come: ${error.message}`, true);
  }
}

function show(api) {
  at("about").textContent = `${api.info.summary}, version ${api.info.version}. ${api.info.description}`;
  const groups = new Map();
  for (const [path, verbs] of Object.entries(api.paths)) {
    for (const [verb, operation] of Object.entries(verbs)) {
      const group = operation.tags[0];
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(route(api, verb, path, operation));
    }
  }
  at("routes").replaceChildren(
    ...[...groups].flatMap(([name, routes]) => [make("h2", { textContent: name }), ...routes]),
  );
}

function route(api, verb, path, operation) {
  const box = make("details", { className: "route" });
  const [note, ...rest] = (operation.description || "").split("\n");
  box.append(
    make(
      "summary",
      {},
      make("span", { className: "verb", textContent: verb.toUpperCase() }),
      make("span", { className: "path", textContent: path }),
      make("span", { className: "note", textContent: note }),
    ),
  );
  box.addEventListener("toggle", () => box.open && fill(), { once: true });
  const fill = () => box.append(make("p", { textContent: rest.join("\n") }), ...details(api, verb, path, operation));
  return box;
}

function details(api, verb, path, operation) {
  const fields = (operation.parameters || []).filter((one) => one.in !== "header");
  const inputs = fields.map((one) => [one, make("input", { autocomplete: "off", placeholder: kind(api, one.schema) })]);
  const bodies = operation.requestBody ? operation.requestBody.content : {};
  const json = bodies["application/json"];
  const text = make("textarea", { spellcheck: false, value: "{}" });
  const file = make("input", { type: "file" });
  const send = make("button", { textContent: "Send" });
  const result = make("pre", { hidden: true });
  send.addEventListener("click", async () => {
    send.disabled = true;
    await ask(verb, path, inputs, json ? text.value : file.files[0], Object.keys(bodies)[0], result);
    send.disabled = false;
  });
  return [
    ...inputs.map(([one, input]) => make("label", {}, `${one.name}${one.required ? "" : " (optional)"} `, input)),
    ...(json ? [heading("Body"), structure(api, json.schema), text] : operation.requestBody ? [heading("Body"), file] : []),
    make("p", {}, send),
    result,
    heading("Answers"),
    ...Object.entries(operation.responses).map(([status, one]) => answer(api, status, one)),
  ];
}

const heading = (textContent) => make("h3", { textContent });

function answer(api, status, one) {
  const box = make("details", {}, make("summary", {}, make("code", { textContent: status }), ` ${one.description}`));
  for (const [type, content] of Object.entries(one.content || {})) {
    box.append(make("p", {}, make("code", { textContent: type })), structure(api, content.schema));
  }
  return box;
}

async function ask(verb, path, inputs, body, type, result) {
  const query = new URLSearchParams();
  let target = path;
  for (const [one, input] of inputs) {
    if (one.in === "path") target = target.replace(`{${one.name}}`, encodeURIComponent(input.value));
    else if (input.value) query.set(one.name, input.value);
  }
  const url = root + target + (query.size ? `?${query}` : "");
  const sent = body === undefined || type === undefined ? {} : { body };
  result.hidden = false;
  result.textContent = "…";
  try {
    const kindOfBody = sent.body ? { "Content-Type": type } : {};
    const answer = await fetch(url, { method: verb.toUpperCase(), headers: headers(kindOfBody), ...sent });
    result.textContent = `${answer.status}\n`;
    await read(answer, result);
  } catch (error) {
    result.textContent = `No answer: ${error.message}`;
  }
}

// Show an answer as it comes; JSON that came whole is set out.
async function read(answer, result) {
  const type = answer.headers.get("content-type") || "";
  if (type && !type.startsWith("text/") && type !== "application/json") {
    result.textContent += `${type}, ${(await answer.blob()).size} bytes`;
    return;
  }
  let text = "";
  const decoder = new TextDecoder();
  for (let reader = answer.body?.getReader(), part; reader && !(part = await reader.read()).done; ) {
    text += decoder.decode(part.value, { stream: true });
    result.textContent = `${answer.status}\n${text}`;
  }
  if (type === "application/json") result.textContent = `${answer.status}\n${JSON.stringify(JSON.parse(text), null, 2)}`;
}

function resolve(api, schema) {
  const name = schema.$ref && schema.$ref.split("/").pop();
  return name ? api.components.schemas[name] : schema;
}

// Name a schema's type in a few words.
function kind(api, given) {
  const schema = resolve(api, given || {});
  const options = schema.anyOf || schema.oneOf;
  if (options) return options.map((one) => kind(api, one)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.type === "array") return `[${kind(api, schema.items)}, …]`;
  if (schema.type === "object" && typeof schema.additionalProperties === "object") {
    return `{name: ${kind(api, schema.additionalProperties)}}`;
  }
  return schema.title && schema.properties ? schema.title : schema.type || "any";
}

// Set a schema out as a table of its fields, each with what it holds.
function structure(api, given, depth = 0) {
  const schema = resolve(api, given);
  if (schema.contentSchema) return structure(api, schema.contentSchema, depth);
  const options = (schema.anyOf || []).map((one) => resolve(api, one)).filter((one) => one.type !== "null");
  if (options.length) return make("div", {}, ...options.map((one) => structure(api, one, depth)));
  if (schema.type === "array") return structure(api, schema.items || {}, depth);
  if (!schema.properties) return make("p", {}, make("code", { textContent: kind(api, schema) }));
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties).map(([name, one]) => {
    const cell = make("td", {}, make("code", { textContent: kind(api, one) }));
    if (one.default !== undefined) cell.append(` = ${JSON.stringify(one.default)}`);
    if (depth < 4 && holds(api, one)) cell.append(structure(api, one, depth + 1));
    return make("tr", {}, make("td", {}, make("code", { textContent: name }), required.has(name) ? "" : " ?"), cell);
  });
  return make("div", {}, make("p", { textContent: schema.description || "" }), make("table", {}, ...rows));
}

// Whether a schema has fields of its own below it.
function holds(api, given) {
  const schema = resolve(api, given || {});
  if (schema.contentSchema || schema.properties) return true;
  return [schema.items, ...(schema.anyOf || [])].some((one) => one && holds(api, one));
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  load();
});
load();
