"""The style sheets of the page and its plots, for light and dark, phones and desktops."""

from __future__ import annotations

# The series colours also differ in lightness, so that colour-blind readers can distinguish them
# (Okabe and Ito 2008, "Color Universal Design").
COLOURS = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1b1e25;--soft:#5a606c;
    --faint:#e7e5df;--hair:#d9d6ce;
    --track:#e9e6df;--good:#0a6b3d;--warn:#8a4b00;--warn-paper:#fff6e6;--s0:#7b8190;--s1:#0b6fb8;
    --s2:#d0570a;
    --s3:#0b8466;--s4:#a8447f;--s5:#8a6d00;--accent:#0b6fb8;--accent-soft:#0b6fb822}
@media (prefers-color-scheme:dark){
  :root{--paper:#14161b;--card:#1c1f26;--ink:#eceae4;--soft:#a3a8b3;--faint:#2a2e37;--hair:#383d48;
      --track:#333843;
    --good:#5fcf95;--warn:#f3bd6b;--warn-paper:#2b2418;--s0:#9aa0ae;--s1:#58b0f2;--s2:#ff9350;
    --s3:#3fc9a4;
    --s4:#e48bc0;--s5:#dcbc45;--accent:#58b0f2;--accent-soft:#58b0f22b}
}
"""

# The rules of the plots; stand-alone pictures contain them too.
PICTURE = """
.plot text{font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
    Arial,sans-serif;
    fill:var(--ink)}
.plot .tick{font-size:11.5px;fill:var(--soft)}
.plot .axis{font-size:12px;fill:var(--soft)}
.plot .name{font-size:12.5px;font-weight:600}
.plot .halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.plot .grid{stroke:var(--faint);stroke-width:1}
.plot .border{stroke:var(--hair);stroke-width:1}
.plot .front{fill:none;stroke:var(--soft);stroke-width:1.25;stroke-dasharray:2 4;
    stroke-linecap:round}
.s0{--c:var(--s0)}
.s1{--c:var(--s1)}
.s2{--c:var(--s2)}
.s3{--c:var(--s3)}
.s4{--c:var(--s4)}
.s5{--c:var(--s5)}
.plot .mark{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.plot .whisker{stroke:var(--c);stroke-width:1.5;opacity:.55}
.plot .bar{fill:var(--c);opacity:.28}
.plot .shape{fill:var(--c);opacity:.8}
.plot .median{stroke:var(--c);stroke-width:2.5}
.plot .quantile{stroke:var(--c);stroke-width:1.5}
.plot .band{fill:none}
.plot .band.odd{fill:var(--ink);opacity:.035}
.plot .curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.plot .curve.dashed{stroke-width:1.5;stroke-dasharray:5 3}
.plot .dot{fill:var(--c)}
"""

PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
    font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
    sans-serif;
    font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main{max-width:1080px;margin:0 auto;padding:28px 16px 64px}
header p,figure,h1,h2,h3{margin:0}
.eyebrow{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;color:var(--soft);
    font-size:.875rem}
.eyebrow b{color:var(--accent);letter-spacing:.02em}
h1{font-size:clamp(1.65rem,1.15rem + 2.5vw,2.75rem);line-height:1.16;letter-spacing:-.022em;
    font-weight:700;
    margin:14px 0 8px;text-wrap:balance;overflow-wrap:break-word}
h1 span{display:inline-block}
h2{font-size:1.22rem;letter-spacing:-.012em;margin:52px 0 4px;line-height:1.3}
h3{font-size:.98rem;margin:0 0 2px}
.lead,.soft{color:var(--soft)}
.lead{max-width:68ch}
.soft{font-size:.875rem;max-width:78ch;margin:2px 0 14px}
.card{background:var(--card);border:1px solid var(--hair);border-radius:12px;padding:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;
    margin-top:24px;padding:0;
    list-style:none}
.tile{display:flex;flex-direction:column;gap:2px;min-width:0}
.tile .what{color:var(--soft);font-size:.8125rem}
.tile .after{font-size:1.6rem;line-height:1.2;font-weight:650;letter-spacing:-.02em;
    white-space:nowrap}
.tile .before{color:var(--soft);font-size:.9375rem}
.tile .remark{font-size:.8125rem;color:var(--soft);margin-top:auto;padding-top:6px}
.meter{height:6px;border-radius:3px;background:var(--track);overflow:hidden;margin-top:8px}
.meter i{display:block;height:100%;background:var(--accent);border-radius:3px}
.stack{display:grid;grid-template-columns:minmax(0,1fr);gap:12px}
.grid2{display:grid;grid-template-columns:minmax(0,1fr);gap:12px}
@media (min-width:860px){
  .grid2{grid-template-columns:repeat(2,minmax(0,1fr))}
}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.9375rem}
th,td{padding:9px 12px;text-align:right;vertical-align:baseline;border-top:1px solid var(--faint)}
thead th{border-top:0;font-weight:650;vertical-align:bottom}
thead th small{display:block;font-weight:400;color:var(--soft)}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
tbody th{font-weight:400;color:var(--soft);text-align:left}
td{white-space:nowrap}
td small{display:block;color:var(--soft);font-size:.78rem}
td.best{font-weight:650}
td.best small{font-weight:400}
table{overflow-wrap:normal}
.figures{table-layout:auto}
.figures tbody th{white-space:nowrap}
tbody th small{display:block;font-size:.78rem;white-space:normal;min-width:11rem;max-width:20rem}
.estimates td small{white-space:normal}
@media (min-width:621px){
  .many{font-size:.8125rem}
  .many td,.many th{padding:9px 5px}
  .many td small,.many tbody th{white-space:normal}
  .estimates td:not(:last-child),.estimates th:not(:first-child):not(:last-child){padding:9px 6px}
}
.notes .soft{margin:10px 0 0;max-width:none}
td.none{color:var(--soft)}
.key{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--c);
    margin-right:.45em}
.key.shape1{border-radius:1px;transform:rotate(45deg) scale(.9)}
.key.shape2{border-radius:1px}
.key.shape3{border-radius:0;clip-path:polygon(50% 0,100% 100%,0 100%)}
.plot{display:block;width:100%;height:auto;overflow:visible}
.wide{display:none}
@media (min-width:640px){
  .wide{display:block}
  .narrow{display:none}
}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.8125rem;color:var(--soft);
    margin:0 0 6px}
.legend span{white-space:nowrap}
.stroke{display:inline-block;width:18px;height:0;border-top:2.5px solid var(--c);
    vertical-align:middle;
    margin-right:6px}
.stroke.dashed{border-top-style:dashed;border-top-width:2px}
.blocks{display:grid;gap:0;margin:0;padding:0;list-style:none}
.block{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:10px 18px;padding:12px 0;
    border-top:1px solid var(--faint)}
.block:first-child{border-top:0;padding-top:0}
.block:last-child{padding-bottom:0}
.block>.name{grid-column:1/-1;font-weight:650;font-size:.9375rem}
.kept{min-width:0}
.kept .caption{display:flex;justify-content:space-between;gap:8px;font-size:.8125rem;
    color:var(--soft);line-height:1.35}
.kept .caption b{color:var(--ink);font-weight:600;white-space:nowrap}
.kept .caption b span{font-weight:400;color:var(--soft)}
.track{display:flex;gap:2px;height:12px;margin-top:4px;border-radius:3px;background:var(--track);
    overflow:hidden}
.track i{display:block;background:var(--accent);border-radius:3px 0 0 3px}
.track.cells{background:none}
.track.cells i{flex:1;background:var(--track);border-radius:2px}
.track.cells i.on{background:var(--accent)}
.track.gone{background:repeating-linear-gradient(135deg,var(--track) 0 5px,transparent 5px 9px)}
.all{border-bottom:2px solid var(--hair);border-top:0;padding-top:0;padding-bottom:14px}
.all+.block{border-top:0}
@media (min-width:720px){
  .block{grid-template-columns:5.2rem repeat(var(--n),minmax(0,1fr));align-items:center}
  .block>.name{grid-column:auto}
  .all{grid-template-columns:5.2rem repeat(var(--n),minmax(0,1fr))}
}
h2+.card,h2+.stack,h2+.warnings{margin-top:12px}
.warnings{margin:0;padding:0;list-style:none;display:grid;gap:8px}
.warnings li{background:var(--warn-paper);border-left:3px solid var(--warn);border-radius:4px;
    padding:8px 12px;
    font-size:.9375rem}
pre{margin:0;overflow-x:auto;font:.875rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
    overflow-wrap:normal}
details{margin-top:12px}
summary{cursor:pointer;color:var(--soft);font-size:.875rem}
details pre{margin-top:10px}
.log{position:relative;height:10px;border-radius:3px;background:var(--track);min-width:90px}
.log i{position:absolute;inset:0 auto 0 0;background:var(--accent);border-radius:3px}
footer{margin-top:56px;color:var(--soft);font-size:.8125rem}
a{color:var(--accent)}
.warnings .note{background:none;border-left-color:var(--hair);color:var(--soft)}
dl{margin:0;display:grid;grid-template-columns:minmax(0,1fr);gap:0 40px;font-size:.9375rem}
pre+dl{margin-top:12px}
dl>div{display:grid;grid-template-columns:minmax(7rem,34%) minmax(0,1fr);gap:12px;padding:7px 0;
    border-top:1px solid var(--faint)}
dl>div:first-child{border-top:0}
dt{color:var(--soft)}
dd{margin:0}
@media (min-width:860px){
  dl{grid-template-columns:repeat(2,minmax(0,1fr))}
  dl>div:nth-child(2){border-top:0}
}
@media (max-width:620px){
  .figures,.figures tbody,.figures thead{display:block}
  .figures tr{display:grid;grid-template-columns:repeat(var(--n),minmax(5.9rem,1fr));gap:0 8px;
      min-width:min-content;
    padding:7px 0 8px;border-top:1px solid var(--faint)}
  .figures thead tr{border-top:0;padding-top:0}
  .figures th,.figures td{border:0;padding:0;text-align:left}
  .figures td small,.figures th{white-space:normal;overflow-wrap:anywhere}
  .figures .corner{display:none}
  .estimates .figures tr{grid-template-columns:repeat(var(--n),minmax(3.9rem,1fr))}
  .figures tbody th{grid-column:1/-1;font-size:.78rem;white-space:normal;padding-bottom:1px}
}
@media (max-width:520px){
  table{font-size:.875rem}
  .parity td{padding:8px 0 8px 8px}
  .parity th{overflow-wrap:anywhere;padding:8px 0}
  .parity .log{min-width:44px}
  .card{padding:14px 13px}
  main{padding-top:20px}
  .tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
  .tile .after{font-size:1.35rem}
  .tile:nth-child(odd):last-child{grid-column:1/-1}
}
@media print{
  body{background:#fff}
  .card{break-inside:avoid}
  h2{break-after:avoid}
}
"""


def page_style() -> str:
    """The style sheet of report.html."""
    return packed(COLOURS + PICTURE + PAGE)


def picture_style() -> str:
    """The style sheet of a stand-alone picture."""
    return packed(COLOURS + PICTURE)


def packed(css: str) -> str:
    """Join the lines of a style sheet."""
    return "".join(line.strip() for line in css.splitlines())
