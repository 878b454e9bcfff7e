"use strict";
/* Asks the server, and reads its answer as it comes. */

class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function refusalOf(response) {
  try {
    const { message, code } = (await response.json()).error;
    return new ServerError(message, response.status, code);
  } catch {
    return new ServerError("The server answered with status " + response.status + ".", response.status);
  }
}

async function modelName() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) throw new ServerError("This server wants an API key. Enter it in the settings.", 401);
  if (!response.ok) throw await refusalOf(response);
  return (await response.json()).data[0].id;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

/* Pieces of an answer: new text, new reasoning, pieces of tool calls, tokens so far, and at the end why it ended. */
async function* answerTo(body, signal) {
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw await refusalOf(response);
  let finish = null;
  for await (const data of events(response)) {
    if (data.error) throw new ServerError(data.error.message, 200, data.error.code);
    const choice = data.choices[0], delta = choice ? choice.delta : {};
    finish = (choice && choice.finish_reason) || finish;
    yield {
      text: delta.content || "", reasoning: delta.reasoning_content || delta.reasoning || "", calls: delta.tool_calls || [],
      tokens: data.usage ? data.usage.completion_tokens : 0, finish,
    };
  }
  if (finish === null) throw new ServerError("The connection ended before the answer did.");
}

/* Adds the pieces of tool calls to the calls so far; names come whole and arguments in pieces. */
function addCalls(calls, pieces) {
  for (const { index, function: piece = {} } of pieces) {
    const call = (calls[index] ||= { name: "", arguments: "" });
    call.name += piece.name || "";
    call.arguments += piece.arguments || "";
  }
}

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty"];
const FIELDS = [...NUMBERS, "system", "max", "ends", "effort", "theme"];  // all that is kept; the key is not

/* The request for an answer to `messages`, or for the rest of the last one. */
function requestFor(model, messages, resume) {
  const system = $("system").value.trim(), ends = $("ends").value.split("\n").filter(Boolean);
  const body = {
    model, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages.map(({ role, content }) => ({ role, content }))],
  };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  if ($("max").value !== "") body.max_completion_tokens = Number($("max").value);
  if (ends.length) body.stop = ends;
  if ($("effort").value) body.reasoning_effort = $("effort").value;
  if (resume) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  return body;
}

/* Tokens, speed and end of an answer, in words. */
class Facts {
  constructor() { this.sent = performance.now(); this.tokens = 0; this.first = 0; }

  add({ tokens, finish }) {
    if (tokens) this.tokens = tokens;
    if (this.tokens && !this.first) { this.first = performance.now(); this.firstTokens = this.tokens; }
    this.last = performance.now();
    this.finish = finish || this.finish;
  }

  text() {
    if (!this.tokens) return this.finish === "stopped" ? "stopped" : "";
    const parts = [this.tokens + (this.tokens === 1 ? " token" : " tokens")], seconds = (this.last - this.first) / 1000;
    if (this.tokens > this.firstTokens && seconds > 0) parts.push(((this.tokens - this.firstTokens) / seconds).toFixed(1) + " tokens/s");
    parts.push("first after " + ((this.first - this.sent) / 1000).toFixed(2) + " s");
    if (this.finish === "length") parts.push("cut at the token limit");
    if (this.finish === "stopped") parts.push("stopped");
    return parts.join(" · ");
  }
}
