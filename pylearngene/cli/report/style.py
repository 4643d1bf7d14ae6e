# SPDX-License-Identifier: Apache-2.0
"""The frame of the report page: html and css as one template, with no logic."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pylearngene demo</title>
<style>
:root { --ink: #222; --soft: #666; --line: #ddd; --blue: #0072b2; --pale: #f3f7fa; --red: #b00020; }
body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink); background: #fff;
  max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p.sub { color: var(--soft); margin: 0 0 1.4rem; }
p.banner { background: var(--red); color: #fff; padding: .8rem 1rem; border-radius: 4px; font-weight: 600; }
img { width: 100%; height: auto; display: block; margin: 1.2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: .8rem 0; }
th, td { text-align: right; padding: .35rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody th { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: var(--pale); }
td.best { font-weight: 700; color: var(--blue); }
table.facts th, table.facts td { text-align: left; white-space: normal; vertical-align: top; }
table.facts th { font-weight: 600; white-space: nowrap; }
table.runs td:nth-child(2), table.runs th:nth-child(2) { text-align: left; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; }
li.loss { list-style: "\\2212  "; } li.win { list-style: "+  "; } li.even { list-style: "=  "; }
code { background: var(--pale); padding: .05rem .3rem; border-radius: 3px; font-size: .9em; }
details summary { cursor: pointer; color: var(--blue); }
</style>
</head>
<body>
<h1>One learngene, networks of many depths</h1>
<p class="sub">The report of <code>pylearngene demo</code>. Every number was measured in this run.</p>
$banner
$lead
$panels
<h2>Test accuracy (%)</h2>
<div class="scroll">$table</div>
<p>Best of each row in bold. Columns are explained below.</p>
<h2>Where it wins and where it loses</h2>
$verdict
<h2>What was done</h2>
$method
<h2>Memory</h2>
<div class="scroll">$memory</div>
<h2>Every loss curve</h2>
<p>Means over up to 15 steps; the loss of every single step is in results.json.</p>
$losses
<details><summary>All runs as numbers</summary><div class="scroll">$losses_table</div></details>
<h2>Checks, machine and versions</h2>
$facts
</body>
</html>
"""
