"use strict";
// The rows, which of them are shown, and the table. `vidbench` is what the explorer sees of it.
const vidbench = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const size = 25;
  const remarks = ["reason", "trust_reasons", "uncounted"];
  const hidden = new Set(["point", ...remarks, "latency_low_s", "latency_high_s"]);
  const byName = new Map(data.columns.map((column) => [column.name, column]));
  const apart = data.columns.filter((column) => column.apart);
  const columns = data.columns.filter((column) => !hidden.has(column.name) && !column.apart);
  if (apart.length) columns.push({ name: "case", head: "also", unit: "", hint: "keys that not every workload has", apart });
  const isNumber = (column) => column.values !== undefined;
  const missing = (value) => value === null || value === undefined;
  const number = (value) => (value === "inf" ? Infinity : value === "-inf" ? -Infinity : value);

  function value(column, row) {
    if (Array.isArray(column.apart)) return column.apart
      .map((key) => [key.name, value(key, row)]).filter((pair) => !missing(pair[1]))
      .map((pair) => pair.join("=")).join(" ") || null;
    if (isNumber(column)) return number(column.values[row]);
    if (column.codes === undefined) return column.texts[row];
    const code = column.codes[row];
    return code < 0 ? null : column.texts[code];
  }

  function text(column, row) {
    const found = value(column, row);
    if (missing(found)) return "–";
    if (!isNumber(column)) return found;
    if (!Number.isFinite(found)) return found > 0 ? "∞" : "−∞";
    if (Number.isInteger(found) && column.unit === "") return String(found);
    const size = Math.abs(found);
    if (size !== 0 && size < 1e-3) return found.toExponential(2);
    if (size >= 1000) return found.toLocaleString("en", { maximumFractionDigits: 0 });
    return found.toPrecision(3);
  }

  // Every row's text in lower case, made once, on the first search.
  let haystack = null;
  function searchable() {
    if (haystack === null) {
      const texts = data.columns.filter((column) => !isNumber(column));
      haystack = Array.from({ length: data.rows }, (_, row) =>
        texts.map((column) => value(column, row) ?? "").join("\n").toLowerCase());
    }
    return haystack;
  }

  function column(name) {
    const wanted = name.toLowerCase();
    return byName.get(wanted) ??
      data.columns.find((c) => c.head.toLowerCase() === wanted.replaceAll("_", " "));
  }

  function condition(word) {
    const parts = /^([a-z0-9_-]+)(<=|>=|<|>|=)(.+)$/i.exec(word);
    const of = parts && column(parts[1]);
    if (of) {
      const wanted = parts[3].toLowerCase();
      const limit = Number(wanted);
      const compare = {
        "<": (v) => v < limit, ">": (v) => v > limit, "<=": (v) => v <= limit, ">=": (v) => v >= limit,
        "=": (v) => (isNumber(of) ? v === limit : String(v).toLowerCase() === wanted),
      }[parts[2]];
      return (row) => {
        const found = value(of, row);
        return !missing(found) && compare(found);
      };
    }
    const wanted = word.toLowerCase();
    const hay = searchable();
    return (row) => hay[row].includes(wanted);
  }

  // --- which rows are shown: words, and what is ticked ---------------------------------------------------------------

  const metrics = new Set(data.metrics);
  const facets = data.columns
    .filter((column) => !metrics.has(column.name) && !["point", ...remarks, "rounds", "samples"].includes(column.name))
    .map((column) => ({ column, chosen: new Set(), values: distinct(column) }))
    .filter((facet) => facet.values.length > 1 && facet.values.length <= 60);

  function distinct(column) {
    const counts = new Map();
    for (let row = 0; row < data.rows; row += 1) {
      const found = value(column, row);
      if (!missing(found)) counts.set(found, (counts.get(found) ?? 0) + 1);
    }
    const values = [...counts.keys()];
    values.sort(isNumber(column) ? (a, b) => a - b : (a, b) => (a < b ? -1 : 1));
    return values.map((one) => ({ value: one, count: counts.get(one) }));
  }

  function drawFacets() {
    const place = document.getElementById("facets");
    for (const facet of facets) {
      const box = cell("details", undefined, "facet");
      const summary = cell("summary");
      const tell = () => {
        summary.replaceChildren(cell("span", facet.column.head), " ",
          cell("b", facet.chosen.size === 0 ? "all" : facet.chosen.size === 1 ? String([...facet.chosen][0]) : `${facet.chosen.size} of ${facet.values.length}`));
        box.classList.toggle("chosen", facet.chosen.size > 0);
      };
      const list = cell("div", undefined, "choices");
      for (const { value: one, count } of facet.values) {
        const label = cell("label");
        const tick = cell("input");
        tick.type = "checkbox";
        tick.addEventListener("change", () => {
          if (tick.checked) facet.chosen.add(one); else facet.chosen.delete(one);
          tell();
          filter();
        });
        label.append(tick, ` ${one} `, cell("small", String(count)));
        list.append(label);
      }
      tell();
      box.append(summary, list);
      place.append(box);
    }
    // One list is open at a time, and none after a click elsewhere or Escape.
    place.addEventListener("toggle", (event) => {
      if (event.target.open) for (const other of place.children) if (other !== event.target) other.open = false;
    }, true);
    document.addEventListener("click", (event) => {
      if (!place.contains(event.target)) for (const box of place.children) box.open = false;
    });
    document.addEventListener("keydown", (event) => {
      const box = event.key === "Escape" && place.querySelector("details[open]");
      if (box) { box.open = false; box.firstChild.focus(); }
    });
  }

  let order = Array.from({ length: data.rows }, (_, row) => row);
  let rows = order;
  let page = 0;
  let sorted = null;
  let ascending = true;

  function sort(by) {
    ascending = sorted === by ? !ascending : true;
    sorted = by;
    const keys = order.map((_, index) => value(by, index));
    const sign = ascending ? 1 : -1;
    order = order.slice().sort((a, b) => {
      const left = keys[a];
      const right = keys[b];
      // What is missing comes last, whichever way the rest is sorted.
      if (missing(left) || missing(right)) return missing(left) - missing(right) || a - b;
      return left < right ? -sign : left > right ? sign : a - b;
    });
    filter();
  }

  const input = document.getElementById("filter");
  function filter() {
    const conditions = input.value.split(/\s+/).filter(Boolean).map(condition);
    for (const { column, chosen } of facets) if (chosen.size) conditions.push((row) => chosen.has(value(column, row)));
    rows = conditions.length ? order.filter((row) => conditions.every((holds) => holds(row))) : order;
    page = 0;
    draw();
    for (const listener of listeners) listener(rows);
  }

  const listeners = [];
  const head = document.querySelector("#table thead");
  const body = document.querySelector("#table tbody");
  const cell = (kind, content, className) => {
    const made = document.createElement(kind);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
  };

  function drawHead() {
    const line = cell("tr");
    for (const of of columns) {
      const made = cell("th", of.head, isNumber(of) ? "number" : "");
      if (of.hint) made.title = of.hint;
      if (sorted === of) {
        made.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        made.append(ascending ? " ↑" : " ↓");
      }
      if (of.unit) made.append(cell("small", of.unit));
      made.tabIndex = 0;
      made.addEventListener("click", () => sort(of));
      made.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(of); });
      line.append(made);
    }
    head.replaceChildren(line);
  }

  // What there is to say of one row: key, interval, reasons, and its profile or how to make one.
  function told(row) {
    const inside = document.createDocumentFragment();
    const low = byName.get("latency_low_s");
    const high = byName.get("latency_high_s");
    inside.append(cell("p", value(byName.get("point"), row), "key"));
    if (low && high && !missing(value(low, row)))
      inside.append(cell("p", `95 % interval of the latency: ${text(low, row)} to ${text(high, row)} ms`));
    for (const name of remarks) {
      const said = value(byName.get(name), row);
      if (!missing(said)) inside.append(cell("p", `${name.replace("_", " ")}: ${said}`));
    }
    const key = value(byName.get("point"), row);
    const profile = data.profiles[key];
    if (profile) {
      const link = cell("a", "where its time goes");
      link.href = profile;
      const line = cell("p");
      line.append(link);
      inside.append(line);
    } else if (value(byName.get("status"), row) === "ok" && !key.includes("/evaluate/"))
      inside.append(cell("p", `where its time goes: vidbench profile '${key}'`, "key"));
    return inside;
  }

  function detail(row) {
    const line = cell("tr", undefined, "detail");
    const inside = cell("td");
    inside.colSpan = columns.length;
    inside.append(told(row));
    line.append(inside);
    return line;
  }

  function draw() {
    drawHead();
    const status = byName.get("status");
    const trust = byName.get("trust");
    const lines = rows.slice(page * size, (page + 1) * size).map((row) => {
      const state = value(status, row);
      const line = cell("tr", undefined, state !== "ok" ? "not-ok" : value(trust, row) === "poor" ? "poor" : "");
      for (const of of columns) {
        const made = cell("td", undefined, isNumber(of) ? "number" : "");
        if (of === status) {
          made.append(cell("span", state, "status " + state));
          const reason = value(byName.get("reason"), row);
          if (!missing(reason)) made.title = reason;
        } else made.textContent = text(of, row);
        line.append(made);
      }
      const unfold = () => {
        const next = line.nextElementSibling;
        if (next && next.className === "detail") next.remove();
        else line.after(detail(row));
      };
      line.tabIndex = 0;
      line.addEventListener("click", unfold);
      line.addEventListener("keydown", (event) => { if (event.key === "Enter") unfold(); });
      return line;
    });
    body.replaceChildren(...lines);
    const pages = Math.max(1, Math.ceil(rows.length / size));
    document.getElementById("count").textContent = rows.length === data.rows
      ? `${data.rows.toLocaleString("en")} points`
      : `${rows.length.toLocaleString("en")} of ${data.rows.toLocaleString("en")} points`;
    document.getElementById("page").textContent = `${(page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    for (const [id, target] of [["first", 0], ["previous", page - 1], ["next", page + 1], ["last", pages - 1]]) {
      const button = document.getElementById(id);
      button.disabled = target < 0 || target >= pages || target === page;
      button.onclick = () => { page = target; draw(); };
    }
  }

  // --- the rows that are shown, to take away ---------------------------------------------------------------------------

  function csv() {
    const quoted = (content) => (/[",\n]/.test(content) ? `"${content.replaceAll('"', '""')}"` : content);
    const lines = [data.columns.map((of) => quoted(of.unit ? `${of.name} (${of.unit})` : of.name)).join(",")];
    for (const row of rows) lines.push(data.columns.map((of) => {
      const found = value(of, row);
      return missing(found) ? "" : quoted(String(found));
    }).join(","));
    return lines.join("\n") + "\n";
  }

  async function copy() {
    const button = document.getElementById("copy");
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(csv());
      button.textContent = `${rows.length.toLocaleString("en")} rows copied`;
    } catch {
      button.textContent = "the browser refuses: use Save";
    }
    setTimeout(() => { button.textContent = before; }, 2000);
  }

  function save() {
    const link = cell("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = "points.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  document.getElementById("copy").addEventListener("click", copy);
  document.getElementById("save").addEventListener("click", save);

  let waiting = 0;
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, data.rows > 5000 ? 200 : 30);
  });
  drawFacets();
  draw();
  return {
    data, value, text, missing, isNumber, told, cell, remarks, column: (name) => byName.get(name), facets,
    rows: () => rows, onRows: (listener) => listeners.push(listener),
  };
})();
