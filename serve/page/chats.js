"use strict";
/* Conversations, kept in this browser alone, one entry each so that two tabs don't overwrite one another's. */

const CHAT = "crucible.chat.";

function newChat() {
  return { id: crypto.randomUUID ? crypto.randomUUID() : String(Date.now()) + Math.random(), created: Date.now(), updated: 0, title: "", first: 0, messages: [] };
}

/* All conversations, the last changed first. Entries that are none of ours are left alone. */
function storedChats() {
  const chats = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    if (!key.startsWith(CHAT)) continue;
    const chat = checkedChat(parsed(localStorage.getItem(key)));
    if (chat) chats.push(chat);
  }
  return chats.sort((a, b) => b.updated - a.updated);
}

/* Throws when the browser has no room, or keeps nothing. */
function storeChat(chat) {
  if (!chat.messages.length) return;
  chat.updated = Date.now();
  chat.title = chat.title || titleOf(chat.messages[0].content);
  localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
}

const removeChat = (chat) => localStorage.removeItem(CHAT + chat.id);

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? line.slice(0, 57) + "..." : line;
}

function parsed(text) {
  try { return JSON.parse(text); } catch { return null; }
}

/* A conversation with the fields that the page reads, or null for what is none. */
function checkedChat(value) {
  if (!value || typeof value.id !== "string" || !Array.isArray(value.messages)) return null;
  const message = (each) => each && ["user", "assistant"].includes(each.role) && typeof each.content === "string";
  if (!value.messages.length || !value.messages.every(message)) return null;
  const number = (each) => (Number.isFinite(each) ? each : 0);
  return { ...value, title: String(value.title || ""), updated: number(value.updated), first: number(value.first) };
}

function asMarkdown(chat) {
  const parts = chat.messages.map(({ role, content }) => `## ${role === "user" ? "You" : "Answer"}\n\n${content}\n`);
  return `# ${chat.title}\n\n${parts.join("\n")}`;
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Can't copy";
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}
