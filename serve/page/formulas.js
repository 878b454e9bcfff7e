"use strict";
/* Formulas: the part of LaTeX's mathematics that models write, as MathML, which browsers lay out themselves.
   What can't be read is shown as it was written. */

const MATHML = "http://www.w3.org/1998/Math/MathML";
const MAX_TOKENS = 4000, MAX_GROUPS = 60;

const GREEK = Object.fromEntries(("alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι "
  + "kappa κ lambda λ mu μ nu ν xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ "
  + "chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω ell ℓ hbar ℏ "
  + "imath ı jmath ȷ Re ℜ Im ℑ aleph ℵ wp ℘ infty ∞ emptyset ∅ varnothing ∅ partial ∂ nabla ∇ top ⊤ bot ⊥ angle ∠ "
  + "triangle △ square □ checkmark ✓ dagger † star ⋆ prime ′ degree °").split(" ").reduce(inPairs, []));
const OPERATORS = Object.fromEntries(("pm ± mp ∓ times × div ÷ cdot ⋅ ast ∗ circ ∘ bullet ∙ oplus ⊕ ominus ⊖ otimes ⊗ odot ⊙ wedge ∧ "
  + "land ∧ vee ∨ lor ∨ neg ¬ lnot ¬ cap ∩ cup ∪ setminus ∖ subset ⊂ supset ⊃ subseteq ⊆ supseteq ⊇ subsetneq ⊊ in ∈ notin ∉ ni ∋ "
  + "leq ≤ le ≤ geq ≥ ge ≥ neq ≠ ne ≠ ll ≪ gg ≫ approx ≈ equiv ≡ sim ∼ simeq ≃ cong ≅ propto ∝ prec ≺ succ ≻ preceq ⪯ succeq ⪰ mid ∣ "
  + "nmid ∤ parallel ∥ perp ⟂ vdash ⊢ models ⊨ forall ∀ exists ∃ nexists ∄ to → rightarrow → leftarrow ← gets ← leftrightarrow ↔ "
  + "Rightarrow ⇒ implies ⟹ Leftarrow ⇐ impliedby ⟸ Leftrightarrow ⇔ iff ⟺ mapsto ↦ longrightarrow ⟶ longleftarrow ⟵ uparrow ↑ "
  + "downarrow ↓ hookrightarrow ↪ rightharpoonup ⇀ leadsto ⇝ therefore ∴ because ∵ ldots … dots … cdots ⋯ vdots ⋮ ddots ⋱ colon : "
  + "langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ lvert | rvert | vert | lVert ‖ rVert ‖ Vert ‖ | ‖ { { } } lbrace { "
  + "rbrace } backslash \\ % % # # & & $ $ _ _ triangleq ≜ coloneqq ≔ asymp ≍").split(" ").reduce(inPairs, []));
const LARGE = Object.fromEntries(("sum ∑ prod ∏ coprod ∐ bigcup ⋃ bigcap ⋂ bigoplus ⨁ bigotimes ⨂ bigvee ⋁ bigwedge ⋀ int ∫ iint ∬ "
  + "iiint ∭ oint ∮").split(" ").reduce(inPairs, []));
const FUNCTIONS = new Set(("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp deg dim ker hom arg").split(" "));
const LIMITS = new Set("lim limsup liminf max min sup inf det gcd Pr argmax argmin".split(" "));
const ACCENTS = Object.fromEntries(("hat ^ widehat ^ bar ‾ overline ‾ vec → overrightarrow → dot ˙ ddot ¨ tilde ~ widetilde ~ check ˇ "
  + "overbrace ⏞").split(" ").reduce(inPairs, []));
const BELOW = { underline: "_", underbrace: "⏟" };
const SPACES = { ",": ".17em", ":": ".22em", ">": ".22em", ";": ".28em", "!": "-.17em", " ": ".25em", quad: "1em", qquad: "2em", "~": ".25em" };
const FENCES = {
  matrix: "", smallmatrix: "", pmatrix: "()", bmatrix: "[]", vmatrix: "||", Vmatrix: "‖‖", Bmatrix: "{}", cases: "{", array: "",
  aligned: "", align: "", "align*": "", alignedat: "", gathered: "", gather: "", "gather*": "", split: "", equation: "", "equation*": "",
};
/* First letter of each alphabet in Unicode's mathematical block: capitals, small letters, digits. */
const ALPHABETS = {
  mathbf: [0x1d400, 0x1d41a, 0x1d7ce], boldsymbol: [0x1d468, 0x1d482, 0x1d7ce], bm: [0x1d468, 0x1d482, 0x1d7ce],
  mathbb: [0x1d538, 0x1d552, 0x1d7d8], mathcal: [0x1d49c, 0x1d4b6, 0x30], mathscr: [0x1d49c, 0x1d4b6, 0x30],
  mathfrak: [0x1d504, 0x1d51e, 0x30], mathsf: [0x1d5a0, 0x1d5ba, 0x1d7e2], mathtt: [0x1d670, 0x1d68a, 0x1d7f6],
};
const ELSEWHERE = {  // letters that Unicode had before that block
  mathbb: { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" }, mathfrak: { C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
  mathcal: { B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
};
ELSEWHERE.mathscr = ELSEWHERE.mathcal;

function inPairs(pairs, word, i) {
  if (i % 2) pairs[pairs.length - 1].push(word);
  else pairs.push([word]);
  return pairs;
}

function math(tag, attributes, ...children) {
  const element = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const child of children.flat()) element.append(child);
  return element;
}

/* The element of a formula; code with its source where it can't be read. */
function formula(source, display) {
  try {
    const row = new FormulaParser(source, display).whole();
    const copy = math("annotation", { encoding: "application/x-tex" }, source);
    const attributes = display ? { display: "block" } : {};
    return math("math", attributes, math("semantics", {}, row, copy));
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return make("code", { textContent: source, title: error.message });
  }
}

class FormulaParser {
  constructor(source, display) {
    this.tokens = source.match(/\\(?:[A-Za-z]+|[\s\S])|\d+(?:,\d{3})*(?:\.\d+)?|[^\s]|\s+/gu) || [];
    if (this.tokens.length > MAX_TOKENS) throw new SyntaxError("The formula is too long.");
    this.at = 0;
    this.groups = 0;
    this.display = display;
    this.font = null;
  }

  whole() {
    const rows = this.cells(() => this.at >= this.tokens.length);
    return rows.length === 1 && rows[0].length === 1 ? rows[0][0] : this.table(rows, "aligned");
  }

  peek() {
    while (/^\s/.test(this.tokens[this.at] || "")) this.at++;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new SyntaxError("The formula ends too early.");
    this.at++;
    return token;
  }

  expect(token) {
    const found = this.next();
    if (found !== token) throw new SyntaxError(`Found ${found} instead of ${token}.`);
  }

  /* Rows of cells, cut at \\ and &, until `done`. */
  cells(done) {
    const rows = [[]];
    for (;;) {
      rows[rows.length - 1].push(this.row((token) => token === "&" || token === "\\\\" || token === "\\cr" || done(token)));
      const token = this.peek();
      if (done(token)) return rows;
      this.at++;
      if (token === "&") continue;
      if (this.peek() === "[") this.bracketed();  // \\[2pt]
      if (!done(this.peek())) rows.push([]);
      else return rows;
    }
  }

  row(done) {
    if (++this.groups > MAX_GROUPS) throw new SyntaxError("The formula is nested too deeply.");
    const children = [];
    for (let token; (token = this.peek()) !== undefined && !done(token);) {
      const node = this.scripted();
      if (node) children.push(node);
    }
    if (!done(this.peek())) throw new SyntaxError("A group is not closed.");
    this.groups--;
    return children.length === 1 ? children[0] : math("mrow", {}, children);
  }

  /* One atom with what stands above and below it. */
  scripted() {
    const base = this.peek() === "^" || this.peek() === "_" ? math("mrow", {}) : this.atom();
    if (!base) return null;
    let below = null, above = null, limits = base.limits === undefined ? null : base.limits;
    for (let token; (token = this.peek());) {
      if (token === "_" && !below) { this.at++; below = this.argument(); }
      else if (token === "^" && !above) { this.at++; above = this.argument(); }
      else if (token === "'" && !above) above = this.primes();
      else if (token === "\\limits" || token === "\\nolimits") { this.at++; limits = token === "\\limits"; }
      else break;
    }
    if (!below && !above) return base;
    const kind = limits ? ["munder", "mover", "munderover"] : ["msub", "msup", "msubsup"];
    if (below && above) return math(kind[2], {}, base, below, above);
    return below ? math(kind[0], {}, base, below) : math(kind[1], {}, base, above);
  }

  primes() {
    let text = "";
    while (this.peek() === "'") { text += "′"; this.at++; }
    const mark = math("mo", {}, text);
    if (this.peek() !== "^") return mark;
    this.at++;
    return math("mrow", {}, mark, this.argument());
  }

  argument() {
    if (this.peek() !== "{") {
      const token = this.peek() || "";
      if (/^\d\d/.test(token)) { this.tokens.splice(this.at, 1, ...token); }  // x^23 is x^2 3
      const node = this.atom();
      if (!node) throw new SyntaxError("An argument is missing.");
      return node;
    }
    this.at++;
    const row = this.row((token) => token === "}");
    this.expect("}");
    return row;
  }

  bracketed() {
    this.expect("[");
    const row = this.row((token) => token === "]");
    this.expect("]");
    return row;
  }

  /* The characters of {...}, spaces too. */
  words() {
    this.expect("{");
    let text = "";
    for (let depth = 1; ;) {
      const token = this.tokens[this.at++];
      if (token === undefined) throw new SyntaxError("A group is not closed.");
      if (token === "{") depth++;
      if (token === "}" && --depth === 0) return text;
      text += /^\\[^A-Za-z]$/.test(token) ? token[1] : token;
    }
  }

  atom() {
    const token = this.next();
    if (token === "{") { this.at--; return this.argument(); }
    if (token === "}" || token === "&") throw new SyntaxError(`${token} stands alone.`);
    if (token[0] === "\\") return this.command(token.slice(1));
    if (/^\d/.test(token)) return math("mn", {}, this.lettered(token));
    if (/^\p{L}$/u.test(token)) return this.identifier(token);
    if (token === "~") return math("mspace", { width: SPACES["~"] });
    return math("mo", /[()[\]|/]/.test(token) ? { stretchy: "false" } : {}, token === "-" ? "−" : token === "*" ? "∗" : token);
  }

  identifier(letter) {
    return math("mi", this.font === "mathrm" ? { mathvariant: "normal" } : {}, this.lettered(letter));
  }

  lettered(text) {
    const alphabet = ALPHABETS[this.font], moved = ELSEWHERE[this.font] || {};
    if (!alphabet) return text;
    const letter = (c) => {
      if (moved[c]) return moved[c];
      const [start, first] = /[A-Z]/.test(c) ? ["A", alphabet[0]] : /[a-z]/.test(c) ? ["a", alphabet[1]] : ["0", alphabet[2]];
      return /[A-Za-z0-9]/.test(c) ? String.fromCodePoint(first + c.charCodeAt(0) - start.charCodeAt(0)) : c;
    };
    return [...text].map(letter).join("");
  }

  command(name) {
    if (Object.hasOwn(GREEK, name)) return math("mi", /^[Α-Ω∞∅]$/u.test(GREEK[name]) ? { mathvariant: "normal" } : {}, GREEK[name]);
    if (Object.hasOwn(LARGE, name)) {
      const sign = math("mo", {}, LARGE[name]);
      return Object.assign(sign, { limits: this.display && !name.endsWith("int") });
    }
    if (Object.hasOwn(OPERATORS, name)) return math("mo", "{}|⟨⟩⌊⌋⌈⌉‖".includes(OPERATORS[name]) ? { stretchy: "false" } : {}, OPERATORS[name]);
    if (FUNCTIONS.has(name)) return math("mi", {}, name);
    if (LIMITS.has(name)) return Object.assign(math("mi", {}, name.replace(/^(lim|arg)(?=.)/, "$1 ")), { limits: this.display });
    if (Object.hasOwn(SPACES, name) || /^\s$/.test(name)) return math("mspace", { width: SPACES[name] || SPACES[" "] });
    if (Object.hasOwn(ACCENTS, name)) {
      const limits = name === "overbrace";
      return Object.assign(math("mover", { accent: "true" }, this.argument(), math("mo", {}, ACCENTS[name])), limits ? { limits } : {});
    }
    if (Object.hasOwn(BELOW, name)) return Object.assign(math("munder", {}, this.argument(), math("mo", {}, BELOW[name])), { limits: name === "underbrace" });
    if (Object.hasOwn(ALPHABETS, name) || ["mathrm", "mathit", "mathnormal", "rm", "bf"].includes(name)) return this.inFont(name);
    if (Object.hasOwn(COMMANDS, name)) return COMMANDS[name](this);
    throw new SyntaxError(`\\${name} is not known.`);
  }

  inFont(name) {
    const outer = this.font;
    this.font = { rm: "mathrm", bf: "mathbf" }[name] || name;
    const letters = this.argument();
    this.font = outer;
    return letters;
  }

  fence() {
    const token = this.next();
    if (token === ".") return null;
    const sign = token[0] === "\\" ? OPERATORS[token.slice(1)] : { "<": "⟨", ">": "⟩" }[token] || token;
    if (!sign) throw new SyntaxError(`${token} is no bracket.`);
    return sign;
  }

  fenced() {
    const open = this.fence(), children = [], sign = (text) => math("mo", { stretchy: "true" }, text);
    if (open) children.push(sign(open));
    for (;;) {
      children.push(this.row((token) => token === "\\right" || token === "\\middle"));
      const token = this.next(), mark = this.fence();
      if (mark) children.push(sign(mark));
      if (token === "\\right") return math("mrow", {}, children);
    }
  }

  environment() {
    const name = this.words();
    if (!Object.hasOwn(FENCES, name)) throw new SyntaxError(`The environment ${name} is not known.`);
    if (name === "array" || name === "alignedat") this.words();
    const rows = this.cells((token) => token === "\\end" || token === undefined);
    this.expect("\\end");
    if (this.words() !== name) throw new SyntaxError(`${name} is not ended.`);
    const [open, close] = FENCES[name], table = this.table(rows, name);
    const fence = (text) => math("mo", { stretchy: "true", fence: "true" }, text);
    return math("mrow", {}, open ? fence(open) : [], table, close ? fence(close) : []);
  }

  table(rows, name) {
    const aligned = /^(align|split|cases|gather)/.test(name);
    const cells = (row) => row.map((cell, i) => {
      const side = name === "cases" || (aligned && i % 2) ? "left" : aligned && row.length > 1 ? "right" : "center";
      return math("mtd", { class: side }, cell);
    });
    const attributes = aligned && this.display ? { displaystyle: "true", class: "aligned" } : {};
    return math("mtable", attributes, rows.map((row) => math("mtr", {}, cells(row))));
  }
}

const upright = (text) => math("mtext", {}, text);
const over = (parser) => { const mark = parser.argument(); return math("mover", {}, parser.argument(), mark); };
const fraction = (parser, attributes = {}) => math("mfrac", attributes, parser.argument(), parser.argument());
const sized = (parser) => math("mo", { stretchy: "false" }, parser.fence() || "");
const COMMANDS = {
  frac: (parser) => fraction(parser),
  dfrac: (parser) => fraction(parser),
  tfrac: (parser) => fraction(parser),
  cfrac: (parser) => fraction(parser),
  binom: (parser) => math("mrow", {}, math("mo", {}, "("), fraction(parser, { linethickness: "0" }), math("mo", {}, ")")),
  sqrt: (parser) => {
    const degree = parser.peek() === "[" ? parser.bracketed() : null;
    return degree ? math("mroot", {}, parser.argument(), degree) : math("msqrt", {}, parser.argument());
  },
  text: (parser) => upright(parser.words()),
  textbf: (parser) => upright(parser.words()),
  textit: (parser) => upright(parser.words()),
  textrm: (parser) => upright(parser.words()),
  mbox: (parser) => upright(parser.words()),
  operatorname: (parser) => {
    const below = parser.peek() === "*";
    if (below) parser.at++;
    return Object.assign(math("mi", { mathvariant: "normal" }, parser.words()), { limits: below && parser.display });
  },
  left: (parser) => parser.fenced(),
  begin: (parser) => parser.environment(),
  overset: over,
  stackrel: over,
  underset: (parser) => { const mark = parser.argument(); return math("munder", {}, parser.argument(), mark); },
  xrightarrow: (parser) => math("mover", {}, math("mo", { stretchy: "true" }, "→"), parser.argument()),
  boxed: (parser) => math("mrow", { class: "boxed" }, parser.argument()),
  not: (parser) => {
    const sign = parser.atom();
    if (sign) sign.append("\u0338");
    return sign;
  },
  bmod: () => math("mo", {}, "mod"),
  mod: () => math("mo", {}, "mod"),
  pmod: (parser) => math("mrow", {}, upright(" (mod "), parser.argument(), upright(")")),
  tag: (parser) => upright("  (" + parser.words() + ")"),
  displaystyle: () => null,
  textstyle: () => null,
  nonumber: () => null,
  notag: () => null,
  label: (parser) => { parser.words(); return null; },
};
for (const size of ["big", "Big", "bigg", "Bigg"]) for (const side of ["", "l", "r", "m"]) COMMANDS[size + side] = sized;
