"use strict";
/* What stands inside a paragraph: emphasis, code, links, formulas. Linear in the text's length, whatever the text. */

const ESCAPED = /\\([!-/:-@[-`{-~])/g;
const LINK = /\(\s*(<[^<>\n]*>|[^\s()<]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'))?\s*\)/y;
const AUTOLINK = /<(https?:\/\/[^\s<>]*|mailto:[^\s<>]*)>/y;
const BARE_LINK = /https?:\/\/[^\s<>]+/y;
const MAX_MARKS = 20;  // of emphasis beside one another, and elements inside one another
const SAFE = /^(https?:|mailto:)/i;

const unescaped = (text) => text.replace(ESCAPED, "$1");

function inlines(text, insideLink = false) {
  const parts = [];  // nodes, and marks of emphasis that are not yet paired
  const absent = new Set();  // closing marks that don't come any more
  const closing = insideLink ? new Map() : brackets(text);
  let plain = "", i = 0;
  const flush = () => { if (plain) parts.push(document.createTextNode(plain)); plain = ""; };
  const add = (node, stop) => { flush(); parts.push(node); i = stop; };
  while (i < text.length) {
    const c = text[i];
    const found = c === "`" ? codeAt(text, i, absent)
      : c === "$" || c === "\\" ? formulaAt(text, i, absent)
      : c === "[" || (c === "!" && text[i + 1] === "[") ? linkAt(text, i, closing)
      : c === "<" || c === "h" ? (insideLink ? null : autolinkAt(text, i))
      : null;
    if (found) { add(...found); continue; }
    if (c === "`" || c === "*" || c === "_" || c === "~") {
      let stop = i + 1;
      while (text[stop] === c) stop++;
      if (c === "`" || stop - i > MAX_MARKS || (c === "~" && stop - i !== 2)) { plain += text.slice(i, stop); i = stop; continue; }
      add(emphasisMark(text, i, stop), stop);
    } else if (c === "\\" && text[i + 1] === "\n") add(make("br"), i + 2);
    else if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] || "")) { plain += text[i + 1]; i += 2; }
    else if (c === "\n") { plain = plain.trimEnd() + "\n"; i++; while (text[i] === " ") i++; }
    else { plain += c; i++; }
  }
  flush();
  return paired(parts);
}

/* Where each "[" is closed; brackets in code count for nothing. */
function brackets(text) {
  const open = [], closing = new Map(), absent = new Set();
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (c === "\\") i++;
    else if (c === "`") {
      const code = codeAt(text, i, absent);
      if (code) i = code[1] - 1;
      else while (text[i + 1] === "`") i++;
    } else if (c === "[") open.push(i);
    else if (c === "]" && open.length) closing.set(open.pop(), i);
  }
  return closing;
}

function codeAt(text, i, absent) {
  const [run] = /^`+/.exec(text.slice(i, i + 100));
  if (absent.has(run)) return null;
  for (let at = i + run.length; (at = text.indexOf(run, at)) >= 0;) {
    let stop = at;
    while (text[stop] === "`") stop++;
    if (stop - at === run.length) {
      let code = text.slice(i + run.length, at).replaceAll("\n", " ");
      if (/^ .* $/.test(code) && code.trim()) code = code.slice(1, -1);
      return [make("code", { textContent: code }), stop];
    }
    at = stop;
  }
  absent.add(run);
  return null;
}

/* $x$, $$x$$, \(x\) and \[x\]. A dollar before a space or a digit closes nothing, so prices stay text. */
function formulaAt(text, i, absent) {
  const open = ["$$", "\\(", "\\[", "$"].find((mark) => text.startsWith(mark, i));
  if (!open || absent.has(open)) return null;
  const close = { "\\(": "\\)", "\\[": "\\]" }[open] || open;
  const start = i + open.length;
  if (open === "$" && /\s|\$/.test(text[start] || " ")) return null;
  for (let at = start; (at = text.indexOf(close, at)) >= 0; at++) {
    const escaped = close[0] === "$" && text[at - 1] === "\\";
    if (escaped || (open === "$" && (/\s/.test(text[at - 1]) || /\d/.test(text[at + 1] || "")))) continue;
    if (at === start) return null;
    return [formula(text.slice(start, at), open === "$$" || open === "\\["), at + close.length];
  }
  absent.add(open);
  return null;
}

/* A link, and of an image its description as a link: showing it would tell another server who reads this. */
function linkAt(text, i, closing) {
  const open = text[i] === "!" ? i + 1 : i, close = closing.get(open);
  if (close === undefined) return null;
  LINK.lastIndex = close + 1;
  const match = LINK.exec(text);
  if (!match) return null;
  const target = unescaped(match[1].replace(/^<|>$/g, ""));
  const inner = text.slice(open + 1, close), title = match[2] ? unescaped(match[2].slice(1, -1)) : "";
  return [link(target, title, inlines(inner || target, true)), LINK.lastIndex];
}

function autolinkAt(text, i) {
  AUTOLINK.lastIndex = BARE_LINK.lastIndex = i;
  const marked = AUTOLINK.exec(text);
  if (marked) return [link(marked[1], "", [marked[1]]), AUTOLINK.lastIndex];
  if (/\w/.test(text[i - 1] || "")) return null;
  const bare = BARE_LINK.exec(text);
  if (!bare) return null;
  let url = bare[0].replace(/[?!.,:;*_~'"]+$/, "");
  const unopened = url.split(")").length - url.split("(").length, closers = /\)*$/.exec(url)[0].length;
  if (unopened > 0) url = url.slice(0, url.length - Math.min(unopened, closers));
  return [link(url, "", [url]), i + url.length];
}

function link(target, title, children) {
  if (!SAFE.test(target)) return make("span", { className: "no-link", title: target }, children);
  return make("a", { href: target, title: title || target, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}

/* Marks as CommonMark has them: what they may open and close depends on the characters around. */
function emphasisMark(text, start, stop) {
  const before = start ? [...text.slice(Math.max(start - 2, 0), start)].pop() : " ";
  const after = stop < text.length ? String.fromCodePoint(text.codePointAt(stop)) : " ";
  const space = (c) => /\s/.test(c), mark = (c) => PUNCTUATION.test(c);
  const left = !space(after) && (!mark(after) || space(before) || mark(before));
  const right = !space(before) && (!mark(before) || space(after) || mark(after));
  const word = text[start] === "_";
  return {
    mark: text[start], count: stop - start, length: stop - start,
    opens: left && (!word || !right || mark(before)), closes: right && (!word || !left || mark(after)),
  };
}

/* Nodes with the marks paired to em, strong and del; marks without a partner are text. */
function paired(parts) {
  const done = [], bottom = new Map();  // below which no opener for a kind of closer is
  for (const part of parts) {
    if (part.mark && part.closes) pairUp(done, part, bottom);
    if (!part.mark || part.count) done.push(part);
  }
  return done.map(nodeOf);
}

/* Takes what stands after each opener of these marks out of `done` and puts an element there. */
function pairUp(done, closer, bottom) {
  const kind = closer.mark + closer.opens + closer.length % 3;
  while (closer.count) {
    const least = bottom.get(kind) || 0;
    let opener = done.length - 1;
    while (opener >= least && !pairs(done[opener], closer)) opener--;
    if (opener < least) { bottom.set(kind, done.length); return; }
    const first = done[opener], count = Math.min(2, first.count, closer.count);
    const depth = 1 + done.slice(opener + 1).reduce((most, each) => Math.max(most, each.depth || 0), 0);
    if (depth > MAX_MARKS) return;
    const inside = done.splice(opener + 1).map(nodeOf);
    first.count -= count;
    closer.count -= count;
    if (!first.count) done.pop();
    done.push(make(closer.mark === "~" ? "del" : count === 2 ? "strong" : "em", { depth }, inside));
    for (const [each, value] of bottom) bottom.set(each, Math.min(value, done.length - 1));
  }
}

function pairs(opener, closer) {
  if (opener.mark !== closer.mark || !opener.opens || !opener.count) return false;
  const both = opener.closes || closer.opens;
  return !(both && (opener.length + closer.length) % 3 === 0 && (opener.length % 3 || closer.length % 3));
}

const nodeOf = (part) => (part.mark ? document.createTextNode(part.mark.repeat(part.count)) : part);
