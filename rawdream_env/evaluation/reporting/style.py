"""The style sheet of the report: light and dark, nothing loaded from anywhere."""

CSS = """
:root { color-scheme: light dark; --bg:#ffffff; --panel:#f6f8fa; --ink:#1f2328; --muted:#59636e; --line:#d1d9e0;
  --sim:#57606a; --dream:#0969da; --good:#1a7f37; --bad:#cf222e; --warn:#9a6700; --first:#8c959f; --last:#bf8700; }
@media (prefers-color-scheme: dark) { :root { --bg:#0d1117; --panel:#151b23; --ink:#e6edf3; --muted:#9198a1;
  --line:#30363d;
  --sim:#b1bac4; --dream:#58a6ff; --good:#3fb950; --bad:#f85149; --warn:#d29922; --first:#6e7681; --last:#d29922; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 21px; margin: 44px 0 8px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 24px 0 6px; }
p { margin: 6px 0; max-width: 76ch; } .muted, .ci { color: var(--muted); } .lead { font-size: 17px; max-width: 70ch; }
.scroll { overflow-x: auto; font-size: 14px; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 18px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; font-size: 13px; color: var(--muted); } tbody th { color: var(--ink); font-size: 15px; }
.rate b { font-size: 18px; } .rate .ci { display: block; font-size: 12px; }
.meter { position: relative; height: 6px; width: 132px; margin: 5px 0 2px; border-radius: 3px;
  background: var(--line); }
.meter i { position: absolute; top: 0; height: 6px; border-radius: 3px; opacity: .38; background: var(--c); }
.meter u { position: absolute; top: -2px; height: 10px; width: 3px; border-radius: 2px; background: var(--c); }
.sim { --c: var(--sim); } .dream { --c: var(--dream); } .ok { --c: var(--good); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; margin: 16px 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.card b { display: block; font-size: 24px; line-height: 1.25; } .card span { display: block; font-size: 13px;
  color: var(--muted); }
.matrices { display: grid; grid-template-columns: repeat(auto-fit, minmax(232px, 1fr)); gap: 14px; margin: 14px 0; }
.matrix { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.matrix table { width: 100%; }
.matrix th, .matrix tbody th, .matrix td { padding: 6px; text-align: center; border: 0; font-size: 13px; }
.matrix .scroll { margin: 6px 0; } .matrix td { font-size: 17px; border-radius: 4px; }
.matrix th { white-space: normal; font-weight: 500; }
  .matrix .yes { background: color-mix(in srgb, var(--good) 16%, transparent); }
.matrix .no { background: color-mix(in srgb, var(--bad) 14%, transparent); } .matrix h3 { margin: 0 0 2px; }
.matrix p { font-size: 12.5px; margin: 4px 0 0; white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 18px; }
.chart { width: 100%; height: auto; } .chart text { fill: var(--muted); font-size: 11.5px; }
  .chart .title { fill: var(--ink); font-size: 13.5px; font-weight: 600; }
.chart .unit { fill: var(--muted); font-weight: 400; } .chart .grid { stroke: var(--line); stroke-width: 1; }
.chart g { stroke: var(--c); fill: var(--c); } .chart polyline { fill: none; stroke-width: 2; }
  .chart .bar { stroke-width: 1.5; opacity: .55; }
.chart .s-dream, .key .s-dream { --c: var(--dream); } .chart .s-first, .key .s-first { --c: var(--first); }
  .chart .s-last, .key .s-last { --c: var(--last); } .chart .s-truth, .key .s-truth { --c: var(--good); }
  .chart .s-alike, .key .s-alike { --c: var(--bad); }
.key span { margin-right: 18px; font-size: 13px; color: var(--muted); } .key i { display: inline-block;
  width: 18px; height: 3px; margin-right: 6px; vertical-align: middle; background: var(--c); }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 18px; margin-top: 12px; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure video { display: block; width: 100%; image-rendering: pixelated; background: #808080; }
  figcaption { padding: 9px 12px 11px; font-size: 13px; }
figcaption b { display: block; } .names { display: grid; grid-template-columns: 1fr 1fr; font-size: 12px;
  color: var(--muted); padding: 6px 12px 4px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 5px;
  vertical-align: baseline; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font-size: 13px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--muted); }
@media print { video { display: none; } }
"""
