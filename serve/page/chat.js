"use strict";
/* The page: conversations, their messages and what can be done with them. */

const $ = (id) => document.getElementById(id);
let chat = newChat();    // the conversation that is shown
let model = null;        // name on the server
let running = null;      // AbortController of the answer under way

/* Elements of a message. */

function addArticle(message) {
  $("welcome").hidden = true;
  const article = make("article", { className: "message " + message.role, ariaLabel: message.role === "user" ? "You" : "Answer" });
  article.message = message;
  article.append(make("div", { className: "body" }), make("div", { className: "actions" }));
  $("dialogue").append(article);
  draw(article);
  return article;
}

function part(article, selector) {
  return article.querySelector(":scope > " + selector);
}

function draw(article) {
  const { role, content, reasoning, calls, facts } = article.message, body = part(article, ".body");
  if (role === "user") body.replaceChildren(make("p", { textContent: content }));
  else showMarkdown(body, content);
  if (reasoning) drawThinking(article, reasoning, content);
  if (calls) drawCalls(article, calls);
  if (facts) line(article, "facts", facts);
}

function drawThinking(article, reasoning, content) {
  let box = part(article, ".thinking");
  if (!box) {
    box = make("details", { className: "thinking" }, make("summary"), make("div"));
    part(article, ".body").before(box);
  }
  box.firstChild.textContent = content ? "Thought" : "Thinking";
  showMarkdown(box.lastChild, reasoning);
}

function drawCalls(article, calls) {
  for (const box of article.querySelectorAll(".call")) box.remove();
  const shown = calls.map(({ name, arguments: given }) => {
    const box = codeElement(given, "calls " + name);
    box.classList.add("call");
    return box;
  });
  part(article, ".body").after(...shown);
}

function line(article, kind, text) {
  let found = part(article, "." + kind);
  if (!found) {
    found = make("div", { className: kind });
    if (kind === "failure") found.setAttribute("role", "alert");
    part(article, ".actions").before(found);
  }
  found.textContent = text;
  return found;
}

function drawAll() {
  for (const old of document.querySelectorAll(".message, .unsent")) old.remove();
  $("welcome").hidden = chat.messages.length > 0;
  chat.messages.forEach((message, i) => {
    if (i === chat.first && i > 0) $("dialogue").append(make("div", { className: "unsent", textContent: "The model no longer sees what is above" }));
    addArticle(message);
  });
  drawActions();
}

/* What can be done with each message; some only with the last. */
function drawActions() {
  const last = chat.messages[chat.messages.length - 1];
  for (const article of document.querySelectorAll(".message")) {
    const message = article.message, buttons = [];
    const button = (label, action) => buttons.push(labelled(label, () => action(article)));
    if (chat.messages.includes(message)) {
      buttons.push(labelled("Copy", (each) => copyText(message.content, each)));
      button("Edit", edit);
      if (message === last && message.role === "assistant") {
        button("Regenerate", regenerate);
        if (message.finish !== "stop") button("Continue", (each) => generate(each, true));
      }
      if (message.versions) buttons.push(...versionButtons(article));
    }
    part(article, ".actions").replaceChildren(...buttons);
  }
}

function labelled(text, action, name = text) {
  const button = make("button", { type: "button", textContent: text, ariaLabel: name });
  button.addEventListener("click", () => action(button));
  return button;
}

function versionButtons(article) {
  const { versions, version } = article.message;
  const turn = (label, name, by) => Object.assign(labelled(label, () => selectVersion(article, version + by), name), { disabled: !versions[version + by] });
  return [turn("‹", "Previous version", -1), make("span", { textContent: `${version + 1} of ${versions.length}` }), turn("›", "Next version", 1)];
}

function follow(force) {
  const box = $("scroller");
  if (force || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/* Asking. */

async function findModel() {
  try {
    model = await modelName();
  } catch (error) {
    if (error.status === 401) expand("settings", true);
    throw error;
  }
  $("model").textContent = $("welcome-model").textContent = model;
  document.title = model + " · Crucible";
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  grow();
  await sendText(text);
  $("prompt").focus();
}

async function sendText(text) {
  const question = { role: "user", content: text }, message = { role: "assistant", content: "" };
  chat.messages.push(question, message);
  addArticle(question);
  await generate(addArticle(message), false);
}

/* Has the model write an answer into an article's message, or go on with it. */
async function generate(article, resume) {
  if (running) return;
  const message = article.message, mine = chat, facts = new Facts(), earlier = message.content;
  const messages = chat.messages.slice(chat.first, resume ? undefined : -1);
  let failure = null;
  begin(article);
  try {
    if (model === null) await findModel();
    for await (const piece of answerTo(requestFor(model, messages, resume), running.signal)) {
      facts.add(piece);
      message.content += piece.text;
      if (piece.reasoning) message.reasoning = (message.reasoning || "") + piece.reasoning;
      if (piece.calls.length) addCalls((message.calls ||= []), piece.calls);
      message.facts = facts.text();
      paint(article);
    }
  } catch (error) {
    if (error.name === "AbortError") facts.finish = "stopped";
    else failure = error;
  }
  message.finish = facts.finish;
  message.facts = facts.text();
  finish(article, mine, failure, message.content !== earlier || Boolean(message.reasoning || message.calls));
}

function begin(article) {
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  $("status").textContent = "Answering";
  notice("");
  for (const selector of [".failure", ".facts"]) part(article, selector)?.remove();
  article.classList.add("busy");
  follow(true);
}

let painting = false;
function paint(article) {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => { painting = false; draw(article); follow(false); });
}

function finish(article, mine, failure, answered) {
  article.classList.remove("busy");
  draw(article);
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("status").textContent = failure ? "No answer" : "Answer complete";
  if (!failure && !article.message.content && !article.message.calls) line(article, "facts", article.message.facts || "The model answered with nothing.");
  if (!answered) takeBack(article, mine);
  if (failure) showFailure(article, failure, answered);
  keep(mine);
  if (mine === chat) drawActions();
  follow(Boolean(failure));
}

/* A question without an answer is no part of the conversation, and is there to be sent again. */
function takeBack(article, mine) {
  const message = article.message;
  if (message.versions) return selectVersion(article, message.version);
  if (message.content) return;  // there was nothing more to say
  mine.messages.pop();
  const { content } = mine.messages.pop();
  if (mine === chat && $("prompt").value === "") {
    $("prompt").value = content;
    grow();
  }
}

function showFailure(article, failure, answered) {
  const unreachable = failure instanceof TypeError;
  const box = line(article, "failure", unreachable ? "The server can't be reached: " + failure.message : failure.message);
  if (failure.status === 401) expand("settings", true);
  if (failure.code === "context_length_exceeded" && !answered && chat.messages.length > chat.first) {
    box.append(make("br"), labelled("Leave out the oldest messages and ask again", () => forgetOldest()));
  }
}

/* A way on when the context is full: the first half of what is sent is left out from now on, up to a question. */
function forgetOldest() {
  const text = $("prompt").value.trim(), sent = chat.messages.length - chat.first;
  let first = chat.first + Math.max(Math.ceil(sent / 2), 1);
  while (first < chat.messages.length && chat.messages[first].role !== "user") first++;
  chat.first = first;
  $("prompt").value = "";
  grow();
  drawAll();
  if (first === chat.messages.length) $("dialogue").append(make("div", { className: "unsent", textContent: "The model no longer sees what is above" }));
  if (text) sendText(text);
}

/* Conversations. */

function keep(which) {
  try {
    storeChat(which);
  } catch (error) {
    notice("This conversation can't be kept in the browser: " + error.message);
  }
  drawChats();
}

function drawChats() {
  let chats = [];
  try { chats = storedChats(); } catch (error) { notice("The browser keeps no conversations: " + error.message); }
  $("chat-list").replaceChildren(...chats.map((each) => {
    const show = labelled(each.title, () => select(each));
    show.className = "open";
    if (each.id === chat.id) show.setAttribute("aria-current", "true");
    const remove = labelled("×", () => {
      if (!confirm(`Delete "${each.title}"?`)) return;
      removeChat(each);
      if (each.id === chat.id) select(newChat());
      drawChats();
    }, "Delete " + each.title);
    return make("li", {}, show, remove);
  }));
}

function select(which) {
  if (running) running.abort();
  chat = which;
  drawAll();
  drawChats();
  if (matchMedia("(max-width: 800px)").matches) expand("chats", false);
  follow(true);
  $("prompt").focus();
}

async function importChats(file) {
  const list = parsed(await file.text()), chats = Array.isArray(list) ? list.map(checkedChat) : [];
  if (!chats.length || chats.includes(null)) return notice(`${file.name} holds no conversations that were exported here.`);
  notice("");
  for (const each of chats) keep(each);
}

/* Controls. */

function expand(id, shown) {
  $(id).hidden = !shown;
  $(id === "chats" ? "toggle-chats" : "toggle").setAttribute("aria-expanded", String(shown));
}

function grow() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = box.scrollHeight + 2 + "px";
}

function keepSettings() {
  document.documentElement.dataset.theme = $("theme").value;
  const values = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
  try { localStorage.setItem("crucible.settings", JSON.stringify(values)); } catch { /* they hold while the page is open */ }
}

function restoreSettings() {
  let values = null;
  try { values = parsed(localStorage.getItem("crucible.settings")); } catch { /* the page's own values hold */ }
  for (const id of FIELDS) if (values && typeof values[id] === "string") $(id).value = values[id];
  document.documentElement.dataset.theme = $("theme").value;
}

function onKey(event) {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "Escape" && running) running.abort();
  else if (event.altKey && event.code === "KeyN") { event.preventDefault(); select(newChat()); }
  else if (event.key === "/" && !typing) { event.preventDefault(); $("prompt").focus(); }
}

function onPromptKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  if (event.key === "ArrowUp" && $("prompt").value === "" && !running) {
    const asked = [...document.querySelectorAll(".message.user")].pop();
    if (asked && chat.messages.includes(asked.message)) { event.preventDefault(); edit(asked); }
  }
}

const WELCOME = $("welcome-text").textContent;
function greet() {
  findModel().then(() => { $("welcome-text").textContent = WELCOME; }, (error) => { $("welcome-text").textContent = error.message; });
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", onPromptKey);
document.addEventListener("keydown", onKey);
$("stop").addEventListener("click", () => running && running.abort());
$("toggle").addEventListener("click", () => expand("settings", $("settings").hidden));
$("toggle-chats").addEventListener("click", () => expand("chats", $("chats").hidden));
$("new").addEventListener("click", () => select(newChat()));
$("key").addEventListener("change", () => { model = null; greet(); });
for (const id of FIELDS) $(id).addEventListener("change", keepSettings);
$("export").addEventListener("click", () => download("conversations.json", "application/json", JSON.stringify(storedChats(), null, 1)));
$("export-one").addEventListener("click", () => download("conversation.md", "text/markdown", asMarkdown(chat)));
$("import").addEventListener("change", () => importChats($("import").files[0]).then(() => { $("import").value = ""; }));
window.addEventListener("storage", drawChats);
restoreSettings();
drawChats();
greet();
grow();
