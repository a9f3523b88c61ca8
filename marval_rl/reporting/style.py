"""The page's style sheet: system fonts, light and dark, one column on a phone."""

from __future__ import annotations

COLOURS = 8  # runs beyond the eighth take the colours again, dashed and with a square mark

STYLE = """
:root{--paper:#fcfcfa;--card:#fff;--ink:#1c1e21;--soft:#646a73;--line:#e4e4de;--grid:#ecece7;--good:#0a7350;
--bad:#b3311f;--note:#fff7e0;--note-line:#e8c766;
--c0:#2a62c9;--c1:#cc5a0a;--c2:#0d8468;--c3:#b3307f;--c4:#8f6d00;--c5:#6d48c8;--c6:#0b7793;--c7:#a8322a}
@media(prefers-color-scheme:dark){:root{--paper:#131519;--card:#1a1d22;--ink:#e7e8ea;--soft:#9aa1ab;--line:#2d3138;
--grid:#262a30;--good:#55cfa3;--bad:#ff8f7d;--note:#29251a;--note-line:#7d6a30;
--c0:#7fabff;--c1:#ffa063;--c2:#4fd0ae;--c3:#f58ac8;--c4:#dfba45;--c5:#b8a1ff;--c6:#5fcbe2;--c7:#ff8d80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
header,main{max-width:1140px;margin:0 auto;padding:0 20px}
header{padding-top:40px;padding-bottom:12px}
h1{font-size:clamp(1.7rem,4vw,2.4rem);line-height:1.15;letter-spacing:-.022em;font-weight:650;margin:0 0 8px;
overflow-wrap:anywhere}
h2{font-size:1.2rem;letter-spacing:-.012em;font-weight:650;margin:0 0 4px}
h3{font-size:.95rem;font-weight:600;margin:20px 0 8px}
section{padding:24px 0 20px;border-top:1px solid var(--line)}
main>section:first-child:not(.findings){border-top:0}
.findings+section{border-top:0}
.facts,.lead,.missing,.soft,small{color:var(--soft)}
.facts{margin:0}
.lead{margin:0 0 14px;text-wrap:pretty}
.missing{margin:8px 0;font-size:.9rem}
i{display:inline-block;width:.68em;height:.68em;border-radius:50%;background:var(--c);margin-right:.45em}
ul{list-style:none;margin:0;padding:0}
.runs li{margin:3px 0}.runs .facts{margin-left:.3em}
.legend{position:sticky;top:0;z-index:3;display:flex;gap:6px 18px;overflow-x:auto;background:var(--paper);
border-bottom:1px solid var(--line);padding:9px max(20px,calc((100vw - 1100px)/2));font-size:.9rem;white-space:nowrap}
.legend label{cursor:pointer}
.legend input{position:absolute;opacity:0}
.legend input:not(:checked)+i{background:none;box-shadow:inset 0 0 0 2px var(--c)}
.legend label:has(input:not(:checked)){color:var(--soft);text-decoration:line-through}
.legend label:has(:focus-visible){outline:2px solid var(--c);outline-offset:3px;border-radius:3px}
.findings{background:var(--note);border:1px solid var(--note-line);border-radius:8px;padding:12px 16px;
margin:10px 0 16px}
.findings h2{font-size:1rem}.findings li{margin:3px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin-top:10px}
th,td{text-align:left;vertical-align:top;padding:7px 26px 7px 0;border-bottom:1px solid var(--line);font-weight:400}
thead th{font-size:.85rem;color:var(--soft);white-space:nowrap}
thead th[class]{color:var(--ink);font-weight:600}
tbody th{min-width:9rem}
td{white-space:nowrap}
.compact td,.compact th,.settings td,.settings th{padding-top:4px;padding-bottom:4px;font-size:.92rem}
table.settings td{white-space:normal;min-width:7rem}
td b,dd b{font-weight:650;font-size:1.05em}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:16px 22px;margin:12px 0 6px;
font-variant-numeric:tabular-nums}
.tiles dt{font-size:.92rem;line-height:1.3;margin-bottom:3px}.tiles dd{margin:0;font-size:1.1rem}
.tiles>div{display:flex;flex-direction:column;justify-content:space-between;border-left:2px solid var(--line);
padding-left:12px}
small{display:block;font-size:.8rem;line-height:1.4}
.good{color:var(--good)}.bad{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:22px 26px;margin-top:12px}
figure{margin:0}
.charts figure{max-width:480px}
.charts figcaption{font-weight:600;font-size:.92rem;margin-bottom:4px}
.charts figcaption span{font-weight:400;color:var(--soft);font-size:.8rem;margin-left:.6em;white-space:nowrap}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:10.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg path{fill:none}
svg .grid{stroke:var(--grid)}svg .base{stroke:var(--line)}
svg .reference{stroke:var(--soft);stroke-dasharray:4 3}
svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px}
svg .line{stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg .logged{stroke:var(--c);stroke-width:1;opacity:.3}
svg .band{fill:var(--c);opacity:.14}
.several svg .band{opacity:.1}
svg circle{fill:var(--c)}
svg tspan[class]{fill:var(--c);font-weight:650}
svg .stop>*{opacity:0}
svg .stop rect{fill:transparent;opacity:1}
svg .stop path{stroke:var(--soft);stroke-dasharray:2 2}
svg .stop:hover>*{opacity:1}
svg:has(.stop:hover) .rest{opacity:0}
.grids{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(200px,calc((100% - 52px)/3));gap:26px;
overflow-x:auto;padding-bottom:6px}
.several .grids{grid-auto-columns:minmax(170px,240px);gap:14px}
.grids img{display:block;width:100%;height:auto;border-radius:4px;background:var(--grid)}
.grids .crisp{image-rendering:pixelated}
.grids figcaption{font-size:.85rem;color:var(--soft);margin-top:5px}
details{margin:8px 0}
summary{cursor:pointer;font-weight:600}
section>details>summary{font-size:1.02rem}
.recipe{columns:3 290px;column-gap:34px;margin:10px 0;
font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.recipe div{display:flex;gap:12px;justify-content:space-between;break-inside:avoid;padding:3px 0;
border-bottom:1px solid var(--grid)}
.recipe dt{color:var(--soft)}.recipe dd{margin:0;text-align:right;overflow-wrap:anywhere}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.notes{columns:2 340px;column-gap:40px;margin:8px 0 40px}
.notes div{break-inside:avoid;margin-bottom:16px}
.notes dt{font-weight:600}.notes dd{margin:2px 0 0;color:var(--soft);font-size:.93rem}
@media(max-width:560px){header,main{padding-left:16px;padding-right:16px}header{padding-top:24px}
.legend{padding-left:16px;padding-right:16px}th,td{padding-right:16px}
.scroll tbody th,.scroll thead th:first-child{position:sticky;left:0;
background:var(--paper);min-width:7.6rem;max-width:9rem}
.tiles{grid-template-columns:1fr 1fr;gap:16px 10px}.tiles dd{font-size:.98rem}
.runs .facts{display:block;margin-left:1.1em;font-size:.9rem}}
"""


def run_style(count: int) -> str:
    """Rules for `count` runs: .r<i> is drawn in the run's colour and can be hidden, .s<i> only takes the colour."""
    rules = []
    for index in range(count):
        rules.append(f".r{index},.s{index}{{--c:var(--c{index % COLOURS})}}")
        rules.append(f"body:has(#run{index}:not(:checked)) .r{index}{{display:none}}")
        if index >= COLOURS:
            rules.append(f".r{index} .line{{stroke-dasharray:5 3}}.s{index} i{{border-radius:0}}")
    return "\n".join(rules)
