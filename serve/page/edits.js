"use strict";
/* Changing what was said: other versions of an answer, edited texts. */

function regenerate(article) {
  const message = article.message;
  if (running) return;
  if (!message.versions) Object.assign(message, { versions: [versionOf(message)], version: 0 });
  else message.versions[message.version] = versionOf(message);
  Object.assign(message, { content: "", reasoning: undefined, calls: undefined, facts: undefined });
  part(article, ".thinking")?.remove();
  generate(article, false).then(() => {
    if (message.content === message.versions[message.version].content && message.facts === message.versions[message.version].facts) return;
    message.version = message.versions.push(versionOf(message)) - 1;
    keep(chat);
    drawActions();
  });
}

const versionOf = ({ content, reasoning, calls, facts, finish }) => ({ content, reasoning, calls, facts, finish });

function selectVersion(article, version) {
  const message = article.message;
  if (message.content) message.versions[message.version] = versionOf(message);
  Object.assign(message, versionOf(message.versions[version]), { version });
  for (const selector of [".thinking", ".call", ".facts"]) part(article, selector)?.remove();
  draw(article);
  drawActions();
  keep(chat);
}

function edit(article) {
  if (running || part(article, ".editor")) return;
  const message = article.message, asks = message.role === "user";
  const box = make("textarea", { value: message.content, rows: Math.min(message.content.split("\n").length + 1, 12), ariaLabel: "Edited text" });
  const close = () => { editor.remove(); part(article, ".body").hidden = part(article, ".actions").hidden = false; };
  const save = () => {
    close();
    if (!box.value.trim() || box.value === message.content) return;
    if (asks) askAgain(message, box.value.trim());
    else { message.content = box.value; draw(article); keep(chat); }
  };
  const editor = make("div", { className: "editor" }, box, make("div", { className: "actions" }, labelled(asks ? "Save and ask" : "Save", save), labelled("Cancel", close)));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
  });
  part(article, ".body").hidden = part(article, ".actions").hidden = true;
  article.prepend(editor);
  box.focus();
}

function askAgain(message, text) {
  chat.messages.length = chat.messages.indexOf(message);
  chat.first = Math.min(chat.first, chat.messages.length);
  drawAll();
  sendText(text);
}
