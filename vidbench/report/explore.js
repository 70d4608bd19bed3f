"use strict";
// Two figures of every row against each other: which are best at both, what a point is, where its time goes.
(() => {
  const place = document.getElementById("plot");
  const { data, value, text, missing, isNumber, told, cell, column, facets, remarks } = vidbench;
  const MOST_INTERVALS = 600; // more of them hide the points
  const MANY = 2500; // from here on the points are drawn by the GPU

  const numbers = data.columns.filter(isNumber);
  const groups = facets.map((facet) => facet.column);
  const choosers = {};
  const axes = [preferred(["latency_s"]), preferred(["top1_accuracy", "peak_memory_bytes", "flops"])];
  for (const [id, columns, wanted] of [
    ["x", numbers, axes[0]], ["y", numbers, axes[1]],
    ["colour", groups, ["implementation", "workload"].map(column).find(tellsApart) ?? groups[0]],
  ]) {
    const chooser = choosers[id] = document.getElementById(`explore-${id}`);
    for (const of of columns) {
      const option = cell("option", of.unit ? `${of.hint || of.head} (${of.unit})` : of.hint || of.head);
      option.value = of.name;
      option.selected = of === wanted;
      chooser.append(option);
    }
    chooser.addEventListener("change", draw);
  }
  const chosen = (id) => column(choosers[id].value);

  // The first of these that enough rows have beside a latency.
  function preferred(names) {
    const latency = column("latency_s");
    const both = (of) => {
      let count = 0;
      for (let row = 0; row < data.rows && count < 2; row += 1)
        if (!missing(value(of, row)) && (!latency || !missing(value(latency, row)))) count += 1;
      return count > 1;
    };
    return names.map(column).find((of) => of && both(of)) ?? numbers[0];
  }

  // Whether the points that are drawn at first have more than one value of it.
  function tellsApart(of) {
    if (!groups.includes(of)) return false;
    const found = new Set();
    for (let row = 0; row < data.rows && found.size < 2; row += 1)
      if (axes.every((axis) => axis && !missing(value(axis, row)))) found.add(value(of, row));
    return found.size > 1;
  }

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Ten colours are told apart; the eleventh value begins them anew in another shape.
  function colours(of) {
    const values = groups.includes(of) ? facets.find((facet) => facet.column === of).values.map((one) => String(one.value)) : [];
    const shapes = ["circle", "diamond", "square", "triangle-up", "cross", "star"];
    return new Map(values.map((name, index) => [name, {
      color: (of.name === "implementation" && data.palette[name]) || data.cycle[index % data.cycle.length],
      symbol: shapes[Math.floor(index / data.cycle.length) % shapes.length],
    }]));
  }

  // From small to large where they span a factor of eight, else plain.
  function scale(of, values) {
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const log = low > 0 && high / low >= 8;
    return {
      type: log ? "log" : "linear", dtick: log ? (high / low < 150 ? "D2" : 1) : undefined,
      title: { text: of.unit ? `${of.hint || of.head} (${of.unit})` : of.hint || of.head },
      gridcolor: style("--line"), linecolor: style("--muted"), tickcolor: style("--muted"), zeroline: false,
      exponentformat: "power", tickformat: log ? "~g" : "", autorange: true,
    };
  }

  // Rows that no other row beats in one figure without losing in the other.
  function frontier(rows, x, y) {
    if (!x.better || !y.better || x === y) return [];
    const sign = (of) => (of.better === "lower" ? 1 : -1);
    const ranked = rows.slice().sort((a, b) =>
      sign(x) * (value(x, a) - value(x, b)) || sign(y) * (value(y, a) - value(y, b)));
    const best = [];
    let limit = Infinity;
    for (const row of ranked) {
      const at = sign(y) * value(y, row);
      if (at < limit) { best.push(row); limit = at; }
    }
    return best;
  }

  const intervals = (of, rows) => {
    const [low, high] = [column("latency_low_s"), column("latency_high_s")];
    if (of.name !== "latency_s" || !low || !high || rows.length > MOST_INTERVALS) return undefined;
    const away = (end, row, sign) => (missing(value(end, row)) ? 0 : sign * (value(end, row) - value(of, row)));
    return {
      type: "data", symmetric: false, thickness: 1, width: 0,
      array: rows.map((row) => away(high, row, 1)), arrayminus: rows.map((row) => away(low, row, -1)),
    };
  };

  function name(row) {
    return data.columns
      .filter((of) => !["point", ...remarks, "status", "trust", "rounds"].includes(of.name) && !data.metrics.includes(of.name))
      .map((of) => [of, value(of, row)]).filter((pair) => !missing(pair[1]))
      .map(([of, found]) => (isNumber(of) || of.apart ? `${of.head} ${found}` : String(found))).join(" · ");
  }

  function draw() {
    const [x, y, colour] = [chosen("x"), chosen("y"), chosen("colour")];
    if (!x || !y) return;
    const shown = vidbench.rows().filter((row) =>
      Number.isFinite(value(x, row)) && Number.isFinite(value(y, row)) && value(column("status"), row) === "ok");
    const palette = colour ? colours(colour) : new Map();
    const byColour = new Map([...palette.keys()].map((key) => [key, []]));
    for (const row of shown) {
      const key = colour ? String(value(colour, row) ?? "–") : "";
      if (!byColour.has(key)) byColour.set(key, []);
      byColour.get(key).push(row);
    }
    const trust = column("trust");
    const type = shown.length > MANY ? "scattergl" : "scatter";
    const traces = [];
    for (const [key, rows] of byColour) {
      if (!rows.length) continue;
      traces.push({
        type, mode: "markers", name: key, customdata: rows, hoverinfo: "none",
        x: rows.map((row) => value(x, row)), y: rows.map((row) => value(y, row)),
        error_x: intervals(x, rows), error_y: intervals(y, rows),
        marker: {
          ...(palette.get(key) ?? { color: style("--accent") }), size: shown.length > 1000 ? 5 : 8,
          opacity: rows.map((row) => (value(trust, row) === "poor" ? 0.3 : 0.85)),
        },
      });
    }
    const best = frontier(shown, x, y);
    if (best.length) traces.push({
      type: "scatter", mode: "lines", name: "frontier", hoverinfo: "skip",
      x: best.map((row) => value(x, row)), y: best.map((row) => value(y, row)),
      line: { color: style("--ink"), width: 1.2, dash: "dot", shape: "hv" },
    });
    Plotly.react(place, traces, {
      height: 460, margin: { l: 70, r: 40, t: 40, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style("--ink") },
      xaxis: scale(x, shown.map((row) => value(x, row))), yaxis: scale(y, shown.map((row) => value(y, row))),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", itemsizing: "constant", font: { size: 12 } },
      modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: style("--muted"), activecolor: style("--accent") },
      hovermode: "closest", dragmode: "zoom",
    }, {
      responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg", filename: "explorer" },
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
    const absent = vidbench.rows().length - shown.length;
    document.getElementById("explored").textContent =
      `${shown.length.toLocaleString("en")} points` + (absent ? `; ${absent.toLocaleString("en")} without one of these figures` : "");
    drawFrontier(best, x, y);
    document.getElementById("picked").replaceChildren();
  }

  // The frontier in words too: for those who do not see the plot, and for paper.
  function drawFrontier(best, x, y) {
    const list = document.getElementById("frontier");
    list.replaceChildren();
    if (!best.length) {
      list.append(cell("p", "No frontier: of one of these figures neither more nor less is better.", "muted"));
      return;
    }
    const told = cell("p", `${best.length === 1 ? "One point is" : `${best.length} points are`} beaten in both by none:`);
    const lines = cell("ol");
    for (const row of best.slice(0, 12)) {
      const line = cell("li");
      line.append(cell("b", `${text(x, row)} ${x.unit}, ${text(y, row)} ${y.unit}`), ` ${name(row)} `);
      lines.append(line);
    }
    list.append(told, lines);
    if (best.length > 12) list.append(cell("p", `and ${best.length - 12} more.`, "muted"));
  }

  const tip = cell("div", undefined, "tip");
  tip.hidden = true;
  document.body.append(tip);

  function hover(event) {
    const point = event.points[0];
    const row = point.customdata;
    if (row === undefined) return;
    const [x, y] = [chosen("x"), chosen("y")];
    const lines = [cell("b", name(row))];
    for (const of of new Set([x, y])) lines.push(cell("span", `${of.hint || of.head}: ${text(of, row)} ${of.unit}`));
    const [low, high] = [column("latency_low_s"), column("latency_high_s")];
    if (low && high && !missing(value(low, row)))
      lines.push(cell("span", `95 % interval of the latency: ${text(low, row)} to ${text(high, row)} ms`));
    const reasons = value(column("trust_reasons"), row);
    lines.push(cell("span", `trust: ${value(column("trust"), row)}${missing(reasons) ? "" : ` (${reasons})`}`));
    tip.replaceChildren(...lines);
    tip.hidden = false;
    const at = event.event;
    tip.style.left = `${Math.min(at.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(at.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  }

  draw();
  place.on("plotly_hover", hover);
  place.on("plotly_unhover", () => { tip.hidden = true; });
  place.on("plotly_click", (event) => {
    const row = event.points[0].customdata;
    if (row !== undefined) document.getElementById("picked").replaceChildren(told(row));
  });
  vidbench.onRows(draw);
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", draw);
})();
