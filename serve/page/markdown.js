"use strict";
/* Markdown as elements: CommonMark's blocks and inlines, with GitHub's tables, task lists and strikethrough, and formulas.
   Every element is made here and text is only ever text, so nothing in an answer becomes markup, and nothing is loaded. */

const MAX_DEPTH = 12;  // of quotes and lists inside one another
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-+*]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const child of children.flat()) element.append(child);
  return element;
}

/* Shows `text` in `body`. Blocks that did not change since the last call keep their elements, and so a selection in them. */
function showMarkdown(body, text) {
  const blocks = blocksOf(linesOf(text), 0), known = body.blocks || [];
  let same = 0;
  while (same < Math.min(blocks.length, known.length) && sameBlock(blocks[same], known[same])) same++;
  while (body.childNodes.length > same) body.lastChild.remove();
  for (const block of blocks.slice(same)) body.append(elementOf(block, 0));
  body.blocks = blocks;
}

const sameBlock = (a, b) => a.kind === b.kind && a.source === b.source;
const linesOf = (text) => text.replace(/\r\n?/g, "\n").split("\n").map((line) => line.replace(/^[ \t]+/, untabbed));

function untabbed(space) {
  let width = 0;
  for (const c of space) width += c === "\t" ? 4 - width % 4 : 1;
  return " ".repeat(width);
}

const indentOf = (line) => line.length - line.trimStart().length;

/* Blocks, each with its kind and source lines. A block that has not been closed goes to the end, as while it streams in. */
function blocksOf(lines, depth) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) { i++; continue; }
    const [kind, stop, more] = blockAt(lines, i, depth);
    blocks.push({ kind, lines: lines.slice(i, stop), source: lines.slice(i, stop).join("\n"), ...more });
    i = stop;
  }
  return blocks;
}

function blockAt(lines, i, depth) {
  const line = lines[i];
  if (indentOf(line) >= 4) return ["indented", endOfIndented(lines, i)];
  if (FENCE.test(line)) return ["fence", endOfFence(lines, i)];
  if (/^\s*(\$\$|\\\[)/.test(line)) {
    const stop = endOfFormula(lines, i);
    if (stop) return ["formula", stop];
  }
  if (HEADING.test(line)) return ["heading", i + 1];
  if (RULE.test(line)) return ["rule", i + 1];
  if (QUOTE.test(line) && depth < MAX_DEPTH) return ["quote", endOfQuote(lines, i)];
  if (ITEM.test(line) && depth < MAX_DEPTH) return listAt(lines, i);
  if (isTable(lines, i)) return ["table", endOfRun(lines, i + 2, (each) => each.trim() && !interrupts(each))];
  return paragraphAt(lines, i);
}

function endOfRun(lines, i, belongs) {
  while (i < lines.length && belongs(lines[i])) i++;
  return i;
}

function endOfIndented(lines, i) {
  let stop = i;
  for (; i < lines.length && (!lines[i].trim() || indentOf(lines[i]) >= 4); i++) if (lines[i].trim()) stop = i + 1;
  return stop;
}

function endOfFence(lines, i) {
  const [, mark] = FENCE.exec(lines[i]);
  const end = new RegExp("^ {0,3}" + (mark[0] === "`" ? "`" : "~") + "{" + mark.length + ",}[ \\t]*$");
  for (i++; i < lines.length; i++) if (end.test(lines[i])) return i + 1;
  return lines.length;
}

function endOfFormula(lines, i) {
  const first = lines[i].trim(), close = first.startsWith("$$") ? "$$" : "\\]";
  for (let at = i, from = 2; at < lines.length && lines[at].trim(); at++, from = 0) {
    const found = lines[at].trim().indexOf(close, from);
    if (found >= 0) return found + 2 === lines[at].trim().length ? at + 1 : 0;
  }
  return 0;
}

function endOfQuote(lines, i) {
  let lazy = false;
  for (; i < lines.length; i++) {
    if (QUOTE.test(lines[i])) lazy = isText(lines[i].replace(QUOTE, ""));
    else if (!lazy || !isText(lines[i])) break;
  }
  return i;
}

/* Whether a line can go on a paragraph. */
const isText = (line) => Boolean(line.trim()) && !interrupts(line);
function interrupts(line) {
  if (indentOf(line) >= 4) return false;
  const item = ITEM.exec(line);
  const begins = item && line.length > item[0].length && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || Boolean(begins);
}

function isTable(lines, i) {
  const next = lines[i + 1];
  return lines[i].includes("|") && next !== undefined && next.includes("-") && TABLE_RULE.test(next)
    && cellsOf(lines[i]).length === cellsOf(next).length;
}

function paragraphAt(lines, i) {
  for (let at = i + 1; at < lines.length; at++) {
    const underline = /^ {0,3}(=+|-+)[ \t]*$/.exec(lines[at]);
    if (underline) return ["underlined", at + 1, { level: underline[1][0] === "=" ? 1 : 2 }];
    if (!isText(lines[at]) || isTable(lines, at) || /^\s*(\$\$|\\\[)/.test(lines[at])) return ["paragraph", at];
  }
  return ["paragraph", lines.length];
}

/* A list: its items' own lines without their indent, and whether blank lines stand between them. */
function listAt(lines, i) {
  const kindOf = (mark) => mark.replace(/\d+/, "");
  const [, , mark] = ITEM.exec(lines[i]), items = [];
  let loose = false, end = i;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || kindOf(match[2]) !== kindOf(mark) || RULE.test(lines[i])) break;
    const spaces = match[3].length > 4 || lines[i].length === match[0].length ? 1 : match[3].length;
    const width = match[1].length + match[2].length + spaces, item = [lines[i].slice(width)];
    let blank = false, lazy = isText(item[0]);
    for (i++, end = i; i < lines.length; i++) {
      const line = lines[i];
      if (!line.trim()) { blank = true; lazy = false; item.push(""); continue; }
      if (indentOf(line) >= width) item.push(line.slice(width));
      else if (lazy && isText(line) && !ITEM.test(line)) item.push(line);
      else break;
      lazy = isText(item[item.length - 1]);
      if (item.length > 1 && !item[0].trim() && !item[1].trim()) break;
      end = i + 1;
      blank = false;
    }
    while (item.length && !item[item.length - 1].trim()) item.pop();
    items.push(item);
    const next = i < lines.length && ITEM.exec(lines[i]);
    if (blank && next && kindOf(next[2]) === kindOf(mark)) loose = true;
  }
  return ["list", end, { items, loose, ordered: /\d/.test(mark), start: parseInt(mark, 10) }];
}

function elementOf(block, depth) {
  const lines = block.lines;
  switch (block.kind) {
    case "heading": {
      const [, marks, text] = HEADING.exec(lines[0]);
      return make("h" + marks.length, {}, inlines((text || "").replace(/(^|[ \t]+)#+[ \t]*$/, "").trim()));
    }
    case "underlined": return make("h" + block.level, {}, inlines(lines.slice(0, -1).join("\n").trim()));
    case "rule": return make("hr");
    case "fence": return fenceElement(lines);
    case "indented": return codeElement(lines.map((line) => line.slice(4)).join("\n"), "");
    case "formula": return make("div", { className: "formula" }, formula(block.source.trim().slice(2, -2), true));
    case "quote": {
      const inner = blocksOf(lines.map((line) => line.replace(QUOTE, "")), depth + 1);
      return make("blockquote", {}, inner.map((each) => elementOf(each, depth + 1)));
    }
    case "list": return listElement(block, depth);
    case "table": return tableElement(lines);
    default: return make("p", {}, inlines(lines.map((line) => line.trimStart()).join("\n").trim()));
  }
}

function fenceElement(lines) {
  const [, mark, info] = FENCE.exec(lines[0]), indent = indentOf(lines[0]);
  const last = lines[lines.length - 1].trim();
  const closed = lines.length > 1 && last.length >= mark.length && [...last].every((c) => c === mark[0]);
  const code = lines.slice(1, closed ? -1 : undefined).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return codeElement(code.join("\n"), unescaped(info.trim().split(/\s+/)[0]));
}

function codeElement(text, language) {
  const copy = make("button", { type: "button", className: "copy", textContent: "Copy" });
  copy.addEventListener("click", () => copyText(text, copy));
  const bar = make("div", { className: "code-bar" }, make("span", { textContent: language }), copy);
  const code = make("code", { textContent: text });
  if (language) code.dataset.language = language;
  return make("div", { className: "code" }, bar, make("pre", { tabIndex: 0 }, code));
}

function listElement(block, depth) {
  const items = block.items.map((lines) => blocksOf(lines, depth + 1));
  const gaps = block.items.some((lines, i) => items[i].length > 1 && gapBetween(lines, items[i]));
  const loose = block.loose || gaps;
  const list = make(block.ordered ? "ol" : "ul", {}, items.map((blocks) => itemElement(blocks, loose, depth)));
  if (block.ordered && block.start !== 1) list.start = block.start;
  return list;
}

function gapBetween(lines, blocks) {
  const used = blocks.reduce((sum, block) => sum + block.lines.length, 0);
  return lines.filter((line, i) => i || line.trim()).length > used;
}

function itemElement(blocks, loose, depth) {
  const item = make("li");
  blocks.forEach((block, i) => {
    const task = i === 0 && block.kind === "paragraph" && /^\[([ xX])\]\s/.exec(block.source);
    if (task) {
      block = { ...block, lines: [block.lines[0].slice(3), ...block.lines.slice(1)] };
      const done = task[1] !== " ";
      item.append(make("input", { type: "checkbox", disabled: true, checked: done, ariaLabel: done ? "done" : "to do" }), " ");
    }
    const element = elementOf(block, depth + 1);
    if (block.kind === "paragraph" && !loose) for (const child of [...element.childNodes]) item.append(child);
    else item.append(element);
  });
  return item;
}

function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (cells.length > 1 && !cells[cells.length - 1].trim()) cells.pop();
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function tableElement(lines) {
  const sides = cellsOf(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (line, tag) => {
    const cells = cellsOf(line);
    return make("tr", {}, sides.map((side, i) => make(tag, { className: side }, inlines(cells[i] || ""))));
  };
  const table = make("table", {}, make("thead", {}, row(lines[0], "th")));
  if (lines.length > 2) table.append(make("tbody", {}, lines.slice(2).map((line) => row(line, "td"))));
  return make("div", { className: "table", tabIndex: 0 }, table);
}
