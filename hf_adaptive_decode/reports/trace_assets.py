"""The style sheet and the script of a trace page, fixed texts but for the colours; knows no traces."""

from __future__ import annotations

from .colours import ACTION_COLOURS, ramp, text_on

_STYLE = """\
:root { color-scheme: light dark; --page: #ffffff; --text: #1a1a1a; --soft: #5c5c5c; --line: #d0d0d0; --card: #f6f6f6; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16161a; --text: #ececec; --soft: #a8a8a8; --line: #404048; --card: #222228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 100rem; background: var(--page); color: var(--text);
  font: 0.95rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 0.75rem; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.facts, .note { color: var(--soft); margin: 0.15rem 0 0.6rem; font-size: 0.85rem; }
.prompt, .tokens { font: 0.95rem/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.prompt { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.75rem;
  max-height: 14rem; overflow: auto; margin: 0 0 1rem; }
.controls { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; align-items: baseline; margin-bottom: 0.5rem; }
fieldset { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; }
fieldset legend { float: left; padding: 0; margin-right: 0.75rem; color: var(--soft); }
label { cursor: pointer; }
.panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem; }
.pane { min-width: 0; border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem; }
.legend { display: none; flex-wrap: wrap; gap: 0.2rem 0.9rem; align-items: center; font-size: 0.85rem;
  margin: 0 0 0.75rem; }
.bar { display: inline-flex; border: 1px solid var(--line); }
.bar .cell { width: 0.5rem; height: 0.9rem; }
.key { display: inline-flex; align-items: center; gap: 0.35rem; }
.key > .cell { width: 1rem; height: 0.9rem; border-radius: 3px; outline: 1px solid var(--line); }
.key small { color: var(--soft); font-size: inherit; }
.token { border-radius: 3px; padding: 0.1em 0; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.token + .token { box-shadow: -1px 0 0 var(--page); }
.token:empty::before { content: "\\25AF"; opacity: 0.6; }
.token:hover, .token:focus { outline: 2px solid var(--text); outline-offset: 1px; }
.mark { font-style: normal; unicode-bidi: isolate; }
.mark::before { content: attr(data-mark); opacity: 0.55; font-size: 0.85em; }
.mark[data-mark="\\2423"]::before, .mark[data-mark="\\21E5"]::before { position: absolute; }
.again1 { text-decoration: underline 2px; } .again2 { text-decoration: underline 2px dashed; }
.again3 { text-decoration: underline 3px dotted; }
#details { position: fixed; z-index: 1; max-width: min(24rem, 94vw); padding: 0.6rem 0.75rem; border-radius: 6px;
  background: var(--card); color: var(--text); border: 1px solid var(--line); box-shadow: 0 4px 16px #0006;
  font-size: 0.85rem; pointer-events: none; }
#details .name { font: 600 1rem ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
#details dl { display: grid; grid-template-columns: auto 1fr; gap: 0 0.75rem; margin: 0.4rem 0; }
#details dt { color: var(--soft); } #details dd { margin: 0; overflow-wrap: anywhere; }
#details table { border-collapse: collapse; width: 100%; }
#details caption { text-align: left; white-space: nowrap; color: var(--soft); }
#details td { padding: 0 0.5rem 0 0; overflow-wrap: anywhere; }
#details td:first-child { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
#details .chosen { font-weight: 700; }
"""

SCRIPT = """\
"use strict";
const panes = JSON.parse(document.getElementById("data").textContent);
const details = document.getElementById("details");
const place = new Map();
let shown = null;
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function recolour() {
  const by = chosen("colour"), ahead = chosen("which") === "next" ? 1 : 0;
  document.body.dataset.colour = by;
  for (const pane of panes)
    pane.spans.forEach((span, i) => { span.className = "token " + (pane.classes[by][i + ahead] ?? "plain"); });
}
function described(pane, i) {
  const short = (value) => value === null ? "not known"
    : value && value < 0.0005 ? value.toExponential(1) : value.toFixed(3);
  const number = (name) => short(pane[name][i]);
  const action = pane.action[i];
  const facts = [["token", `${i + 1} of ${pane.text.length}, id ${pane.token_id[i]}`]];
  facts.push(["temperature T", number("temperature")], ["top-p P", number("top_p")]);
  if (pane.actions.length)
    facts.push(["action", action === null ? "none taken" : `${action}: ${pane.actions[action]}`]);
  facts.push(["entropy", `${number("entropy")} nats`], ["probability", number("probability")]);
  facts.push(["budget left", `${pane.remaining[i]} of ${pane.token_budget}`]);
  const list = element("dl"), table = element("table");
  for (const [name, value] of facts) list.append(element("dt", name), element("dd", value));
  table.append(element("caption", "the base model's likeliest (T = 1)"));
  pane.top_texts[i].forEach((text, k) => {
    const row = element("tr", undefined, pane.top_ids[i][k] === pane.token_id[i] ? "chosen" : "");
    row.append(element("td", text), element("td", short(pane.top_probabilities[i][k])));
    table.append(row);
  });
  return [element("div", pane.text[i], "name"), list, table];
}
function show(span) {
  const [pane, i] = place.get(span), at = span.getClientRects()[0];
  details.replaceChildren(...described(pane, i));
  details.hidden = false;
  shown = span;
  span.setAttribute("aria-describedby", "details");
  const under = at.bottom + 8, fits = under + details.offsetHeight < innerHeight;
  details.style.left = Math.max(8, Math.min(at.left, innerWidth - details.offsetWidth - 8)) + "px";
  details.style.top = Math.max(8, fits ? under : at.top - details.offsetHeight - 8) + "px";
}
function hide(event) {
  details.hidden = true;
  event.target.removeAttribute?.("aria-describedby");
}
function walk(event) {
  const [pane, i] = place.get(event.target) ?? [];
  if (event.key === "Escape") details.hidden = true;
  const last = pane ? pane.spans.length - 1 : 0;
  const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: last }[event.key];
  if (!pane || to === undefined || to < 0 || to > last) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  pane.spans[to].tabIndex = 0;
  pane.spans[to].focus();
}
document.querySelectorAll(".tokens").forEach((box, number) => {
  const pane = panes[number];
  pane.spans = [...box.querySelectorAll(".token")];
  pane.spans.forEach((span, i) => place.set(span, [pane, i]));
  const over = (event) => { const span = event.target.closest(".token"); if (span) show(span); };
  box.addEventListener("pointerover", over);
  box.addEventListener("focusin", over);
  box.addEventListener("pointerout", hide);
  box.addEventListener("focusout", hide);
  box.addEventListener("keydown", walk);
});
for (const input of document.querySelectorAll("input")) input.addEventListener("change", recolour);
addEventListener("scroll", () => { if (!details.hidden) show(shown); }, { passive: true });
recolour();
"""


def style_sheet(quantities: list[str]) -> str:
    """
    The page's style sheet.

    Args:
        quantities (list of `str`): What the page can be coloured by; `<body data-colour=...>` says by which it is.
    """
    colours = ramp()
    rules = [_rule(f"s{step}", colour) for step, colour in enumerate(colours)]
    rules += [_rule(f"a{number}", colour) for number, colour in enumerate(ACTION_COLOURS)]
    # What is low recedes into the page: on a dark one that is the ramp's dark end.
    dark = [_rule(f"s{step}", colour) for step, colour in enumerate(reversed(colours))]
    shown = [f'[data-colour="{name}"] .legend.{name} {{ display: flex; }}' for name in quantities]
    night = ["@media (prefers-color-scheme: dark) {", *dark, "}"]
    return _STYLE + "\n".join([*rules, *night, *shown]) + "\n"


def _rule(name: str, colour: str) -> str:
    return f".{name} {{ background: {colour}; color: {text_on(colour)}; }}"
