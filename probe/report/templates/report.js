// The page's own script: tables sort and filter, charts are drawn when they come into view.
// Everything it shows was put into the page as data; nothing is fetched. Text goes into the page
// as text nodes only, and into plotly escaped.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // --- words -------------------------------------------------------------------------------------

  const score = (v) => v === null || v === undefined ? "–" :
    (v < 0 && Math.abs(v) >= 0.0005 ? "−" : "") + Math.abs(v).toFixed(3).replace(/^0\./, ".");
  const span = (low, high) => low === null || high === null ? "" : `[${score(low)}, ${score(high)}]`;
  const short = (text, n) => [...text].length > n ? [...text].slice(0, n - 1).join("") + "…" : text;
  const signs = { "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;" }; // $ would begin mathematics
  const safe = (text) => String(text).replace(/[&<>$]/g, (c) => signs[c]);
  const named = (text, n = 22) => safe(short(String(text), n));
  // A name in lines, broken between its parts, and within one that is longer than a line.
  function wrapped(text, n) {
    const lines = [];
    const add = (word, sign) => {
      const longer = lines.length ? lines.at(-1) + sign + word : word;
      if (lines.length && [...longer].length <= n) lines[lines.length - 1] = longer;
      else lines.push(word);
    };
    for (const part of String(text).split(" · ")) {
      if ([...part].length <= n) add(part, " · ");
      else part.split(" ").forEach((word, i) => { if (i) add(word, " "); else lines.push(word); });
    }
    return lines.map((line) => named(line, n));
  }

  // --- tables: sorting ---------------------------------------------------------------------------

  function sortable(table) {
    $$("thead th", table).forEach((th, column) => {
      if (th.hasAttribute("aria-hidden")) return;
      const button = make("button", { type: "button" });
      button.append(...th.childNodes);
      const words = [...button.childNodes].find((node) => node.textContent.trim());
      words.after(make("span", { class: "arrow", "aria-hidden": "true" }));
      th.append(button);
      button.addEventListener("click", () => {
        const down = th.getAttribute("aria-sort") === "descending";
        $$("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", down ? "ascending" : "descending");
        const body = $("tbody", table);
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
        const sign = down ? 1 : -1;
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          const [m, n] = [Number(x), Number(y)];
          const numbers = !Number.isNaN(m) && !Number.isNaN(n);
          return sign * (numbers ? m - n : x.localeCompare(y, undefined, { numeric: true }));
        });
        body.append(...rows);
      });
    });
  }

  // --- tables: filters ---------------------------------------------------------------------------

  function filter() {
    const scenario = $("#scenario")?.value ?? "";
    const metric = $("#metric")?.value ?? "";
    for (const row of $$("tr[data-scenario]")) {
      row.hidden = scenario !== "" && row.dataset.scenario !== scenario;
    }
    const tops = new Map();
    const cells = $$("td[data-cell]");
    for (const td of cells) {
      const found = metric === "" ? td.own : data.scores[td.dataset.cell]?.[metric] ?? [null, null, null];
      td.dataset.value = found[0] ?? "";
      $(".value", td).textContent = score(found[0]);
      $(".ci", td).textContent = found[0] === null ? "" : span(found[1], found[2]);
      for (const extra of $$(".mark, .range, .note", td)) extra.hidden = metric !== "";
      td.classList.toggle("best", metric === "" && td.dataset.mark === "best");
      if (found[0] !== null && !td.parentElement.hidden && !td.parentElement.hasAttribute("data-untrained")) {
        const lower = $("#metric")?.selectedOptions[0].hasAttribute("data-lower");
        const top = tops.get(td.cellIndex);
        const better = !top || (lower ? found[0] < top.value : found[0] > top.value);
        tops.set(td.cellIndex, better ? { td, value: found[0], of: (top?.of ?? 0) + 1 } : { ...top, of: top.of + 1 });
      }
    }
    if (metric !== "") for (const { td, of } of tops.values()) td.classList.toggle("best", of > 1);
    $$("[data-own-metric]").forEach((e) => { e.textContent = metric === "" ? e.dataset.ownMetric : $("#metric").selectedOptions[0].textContent; });
    const note = $("#marks");
    if (note) note.hidden = metric !== "";
    const other = $("#untested");
    if (other) other.hidden = metric === "";
    const shown = $("#shown");
    const count = $$("table.main tbody tr").filter((r) => !r.hidden).length;
    if (shown) shown.textContent = `${count} model${count === 1 ? "" : "s"} shown`;
  }

  // --- one result of a data set at a time --------------------------------------------------------

  function pick(section, key) {
    for (const panel of $$("article.result", section)) panel.hidden = panel.id !== key;
    const select = $("select.pick", section);
    if (select) select.value = key;
  }

  function follow() {
    const key = decodeURIComponent(location.hash.slice(1));
    const panel = key ? document.getElementById(key) : null;
    if (!panel?.matches("article.result")) return;
    pick(panel.closest("section"), key);
    panel.scrollIntoView();
  }

  // --- plotly, unpacked when the first chart is wanted -------------------------------------------

  let library = null;
  function plotly() {
    library ??= (async () => {
      const packed = Uint8Array.from(atob($("#plotly").textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script);
      return window.Plotly;
    })();
    return library;
  }

  const look = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const colour = (c) => look(typeof c === "string" ? c : `c${c % 8}`);
  const faint = (c, alpha) => c + Math.round(alpha * 255).toString(16).padStart(2, "0");

  function axis(spec, more = {}) {
    const out = {
      title: { text: named(spec.title, 46), standoff: 8 }, automargin: true, fixedrange: true,
      gridcolor: look("rule"), zerolinecolor: look("rule"), linecolor: look("fold"), tickcolor: look("fold"),
      tickfont: { color: look("muted") }, ...more,
    };
    if (spec.log) Object.assign(out, { type: "log", exponentformat: "power", dtick: 1, showgrid: false });
    if (spec.span) out.range = spec.span;
    if (spec.names?.length) {
      Object.assign(out, { tickvals: spec.names.map((_, i) => i), ticktext: spec.names.map((n) => named(n, 16)), showgrid: false });
    }
    return out;
  }

  function layout(chart, more) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, dragmode: false,
      font: { family: look("sans"), size: 12, color: look("ink") }, hovermode: "closest",
      hoverlabel: { bgcolor: look("card"), bordercolor: look("fold"), font: { color: look("ink") }, align: "left" },
      showlegend: false, modebar: { bgcolor: "rgba(0,0,0,0)", color: look("fold"), activecolor: look("ink") },
      margin: { l: 48, r: 14, t: 10, b: 44 }, ...more,
    };
  }

  const spot = (value, k) => look({ other: "fold", "not tested": "fold", wrong: "c4", right: "c2" }[value] ?? `c${k % 8}`);

  // What each colour stands for; where one line is bold, a click makes it another.
  function legend(figure, chart, own) {
    const series = (chart.series ?? []).filter((s) => s.legend);
    const entries = chart.kind === "points"
      ? chart.facts[own.fact][0].map((value, k) => [value, spot(value, k), "dot"])
      : series.map((s) => [s.name, colour(s.colour), s.look === "dots" ? "dot" : s.look === "cross" ? "cross" : "line"]);
    const list = $(".legend", figure);
    list.hidden = entries.length < 2;
    const bold = chart.focus && entries.length > 2;
    list.replaceChildren(...entries.map(([name, own_, shape]) => {
      const sign = make("span", { class: `sign ${shape}`, "aria-hidden": "true" });
      sign.style.color = own_;
      if (!bold) return make("li", {}, sign, make("bdi", {}, short(name, 120)));
      const button = make("button", { type: "button", "aria-pressed": String(name === own.focus) }, sign, make("bdi", {}, short(name, 120)));
      button.addEventListener("click", () => { own.focus = name; draw(figure).then(() => $("[aria-pressed=true]", list).focus()); });
      return make("li", {}, button);
    }));
  }

  const build = {
    lines(chart, width, focus) {
      const traces = [];
      const banded = chart.series.filter((s) => s.low.length && s.look === "line");
      const chosen = chart.focus && new Set(chart.series.map((s) => s.name)).size > 2;
      for (const s of chart.series) {
        const own = colour(s.colour);
        const back = chosen && s.name !== focus;
        const points = s.look !== "line";
        if (s.low.length && !points && !s.thin && !back && (chosen || banded.length < 3)) {
          const edge = { type: "scatter", mode: "lines", x: s.x, line: { width: 0 }, hoverinfo: "skip" };
          traces.push({ ...edge, y: s.low }, { ...edge, y: s.high, fill: "tonexty", fillcolor: faint(own, 0.18) });
        }
        const where = s.x.map((x) => chart.x.names.length ? chart.x.names[x] : Number(x?.toPrecision(3)));
        const trace = {
          type: "scatter", x: s.x, y: s.y, name: named(s.name, 40),
          mode: s.look === "line" ? "lines" : s.look === "both" ? "lines+markers" : "markers",
          line: { color: own, width: s.thin ? 1 : back ? 1.4 : 2.4, dash: s.dash ? "dash" : "solid" },
          marker: { color: own, size: s.look === "cross" ? 7 : 8, symbol: s.look === "cross" ? "x-thin" : "circle", line: { color: own, width: s.look === "cross" ? 1.4 : 0 } },
          opacity: back ? 0.55 : 1, hoverinfo: s.thin && s.look === "line" ? "skip" : "text",
          hovertext: s.y.map((y, i) => `<b>${named(s.name, 40)}</b><br>${named(chart.x.title, 40)}: ${safe(where[i])}<br>${named(chart.y.title, 40)}: ${score(y)} ${s.low.length ? span(s.low[i], s.high[i]) : ""}`),
        };
        if (points && s.low.length && !back) {
          trace.error_y = { type: "data", symmetric: false, array: s.high.map((h, i) => h - s.y[i]), arrayminus: s.low.map((l, i) => s.y[i] - l), thickness: 1.2, width: 0, color: own };
        }
        traces.push(trace);
      }
      const shapes = [];
      const annotations = [];
      if (chart.diagonal) shapes.push({ type: "line", x0: 0, y0: 0, x1: 1, y1: 1, layer: "below", line: { color: look("fold"), width: 1, dash: "dash" } });
      if (chart.marker) {
        const [at, said] = chart.marker;
        shapes.push({ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: look("ink"), width: 1, dash: "dash" } });
        annotations.push({ x: chart.x.log ? Math.log10(at) : at, y: 1, yref: "paper", yanchor: "bottom", text: safe(said), showarrow: false, font: { size: 11.5 } });
      }
      const few = [...new Set(chart.series.flatMap((s) => s.x))];
      const x = axis(chart.x);
      if (chart.x.log && few.length <= 8) Object.assign(x, { tickvals: few, ticktext: few.map(String) });
      else if (chart.x.log && width < 520) x.dtick = 3; else if (chart.x.log) x.dtick = 2;
      const top = chart.marker ? 22 : 10;
      return [traces, layout(chart, { xaxis: x, yaxis: axis(chart.y), shapes, annotations, margin: { l: 48, r: 14, t: top, b: 44 }, height: 310 + top })];
    },

    dots(chart, width) {
      const S = chart.series.length;
      const traces = chart.series.map((s, k) => ({
        type: "scatter", mode: "markers", name: named(s.name, 40), x: s.x,
        y: s.y.map((y) => y + (k - (S - 1) / 2) * Math.min(0.22, 0.8 / S)),
        marker: { color: colour(s.colour), size: 9 }, hoverinfo: "text",
        error_x: s.low.length ? { type: "data", symmetric: false, array: s.high.map((h, i) => h - s.x[i]), arrayminus: s.low.map((l, i) => s.x[i] - l), thickness: 1.6, width: 0, color: colour(s.colour) } : undefined,
        hovertext: s.x.map((x, i) => `<b>${named(chart.rows[s.y[i]], 40)}</b><br>${S > 1 ? named(s.name, 40) + "<br>" : ""}${named(chart.x.title, 40)}: ${score(x)} ${s.low.length ? span(s.low[i], s.high[i]) : ""}`),
      }));
      const shapes = chart.line === null ? [] : [{ type: "line", x0: chart.line, x1: chart.line, y0: 0, y1: 1, yref: "paper", line: { color: look("muted"), width: 1, dash: "dash" } }];
      const rows = chart.rows.map((name) => wrapped(name, width < 520 ? 20 : 34));
      const tall = Math.max(18 + 9 * S, ...rows.map((lines) => 8 + 15 * lines.length));
      const y = axis({ title: "", names: chart.rows }, { range: [chart.rows.length - 0.4, -0.6] });
      y.ticktext = rows.map((lines) => lines.join("<br>"));
      y.showgrid = false;
      y.zeroline = false;
      return [traces, layout(chart, { xaxis: axis(chart.x, { zeroline: false }), yaxis: y, shapes, margin: { l: 20, r: 14, t: 10, b: 44 }, height: Math.max(190, 70 + chart.rows.length * tall) })];
    },

    bars(chart, width) {
      const n = chart.values.length;
      const places = chart.values.map((_, i) => i);
      const own = chart.values.map((v) => look(v < 0 ? "mark" : "c0"));
      const gain = (v) => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(1) + " %";
      const size = (v) => v === null ? "not known or not trained" : `10<sup>${Math.round(Math.log10(v))}</sup> images`;
      const words = (i) => `<b>${named(chart.foundations[i], 30)}</b><br>${named(chart.classifiers[i], 30)}${chart.doubtful[i] ? "<br>random weights" : ""}<br>gain ${gain(chart.values[i])}<br>pre-training: ${size(chart.sizes[i])}`;
      const hover = { hoverinfo: "text", hovertext: places.map(words) };
      const lines = places.map((i) => [...wrapped(chart.classifiers[i], 24), ...wrapped(chart.foundations[i], 24)]);
      const most = Math.max(...lines.map((label) => label.length));
      const steep = (width - 70) / n < 7.5 * Math.max(...lines.flat().map((line) => line.length));
      const long = steep ? 186 : 44 + 15 * most; // pixels for the labels
      const low = steep ? 45 : 70; // for the bars below them
      const height = 260 + long + low;
      const foot = (long + low) / height; // where the labels begin
      const traces = [
        { type: "bar", x: places, y: chart.values, width: 0.62, text: chart.values.map((v, i) => i === chart.reference ? "reference" : gain(v)), textposition: "outside", cliponaxis: false, textfont: { size: 11 },
          marker: { color: own.map((c, i) => chart.doubtful[i] ? "rgba(0,0,0,0)" : c), line: { color: own, width: 1.4 } }, ...hover },
        { type: "bar", x: places, y: chart.sizes, base: 1e4, width: 0.62, xaxis: "x", yaxis: "y2", marker: { color: look("fold") }, ...hover },
      ];
      traces[1].y = chart.sizes.map((v) => v === null ? null : v - 1e4);
      const ends = [Math.min(0, ...chart.values), Math.max(0, ...chart.values)];
      const spare = 0.14 * (ends[1] - ends[0] || 1);
      const labels = places.map((i) => [...wrapped(chart.classifiers[i], 24), ...wrapped(chart.foundations[i], 24).map((line) => `<b>${line}</b>`)].join("<br>"));
      return [traces, layout(chart, {
        xaxis: axis({ title: "" }, { tickvals: places, ticktext: labels, showgrid: false, zeroline: false, tickangle: steep ? -90 : 0, anchor: "free", position: foot, side: "bottom", range: [-0.6, n - 0.4], automargin: false }),
        yaxis: axis(chart.y, { domain: [foot, 1], zeroline: true, zerolinecolor: look("ink"), range: [ends[0] - spare, ends[1] + spare] }),
        yaxis2: axis({ title: "" }, { domain: [0, low / height], type: "log", range: [4, 10], tickvals: [1e5, 1e7, 1e9], ticktext: ["10<sup>5</sup>", "10<sup>7</sup>", "10<sup>9</sup>"], anchor: "x" }),
        annotations: [{ text: "images of pre-training", x: 0, y: low / height + 0.005, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 11, color: look("muted") } }],
        barmode: "overlay", margin: { l: 56, r: 14, t: 18, b: 10 }, height,
      })];
    },

    heat(chart, width) {
      const [down, across] = [chart.y.names.length, chart.x.names.length];
      const side = Math.min(width - 90, 60 + 52 * across, 620);
      const roomy = Math.max(down, across) <= 15;
      const annotations = roomy ? chart.texts.flatMap((row, i) => row.map((text, j) => ({
        x: j, y: i, text: safe(text), showarrow: false, font: { size: across > 9 ? 10 : 13, color: chart.shares[i][j] > 0.6 ? look("on-cell") : chart.shares[i][j] ? look("ink") : look("fold") },
      }))) : [];
      const trace = {
        type: "heatmap", z: chart.shares, zmin: 0, zmax: 1, showscale: false, hoverinfo: "text", xgap: roomy ? 1 : 0, ygap: roomy ? 1 : 0,
        colorscale: [[0, look("cell-0")], [1, look("cell-1")]],
        hovertext: chart.shares.map((row, i) => row.map((v, j) => `${named(chart.y.title)} <b>${named(chart.y.names[i], 30)}</b><br>${named(chart.x.title)} <b>${named(chart.x.names[j], 30)}</b><br>${safe(chart.texts[i][j])} (${Math.round(100 * v)} %)`)),
      };
      const few = width < 520 ? 9 : 18;
      const flat = { showgrid: false, zeroline: false, constrain: "domain" };
      const names = (spec, turn) => axis(spec, { ...flat, ticktext: spec.names.map((n) => named(n, few)), tickangle: turn });
      return [[trace], layout(chart, {
        xaxis: names(chart.x, chart.x.names.some((n) => n.length > 6) ? -45 : 0),
        yaxis: { ...names(chart.y, 0), autorange: "reversed", scaleanchor: "x" }, annotations, margin: { l: 20, r: 14, t: 8, b: 20 },
        height: Math.max(260, side * down / across + 90),
      })];
    },

    points(chart, width, focus, state) {
      const [across, down, x, y] = chart.layouts[state.way];
      const [values, codes] = chart.facts[state.fact];
      const traces = values.map((value, k) => {
        const here = codes.flatMap((code, i) => code === k ? [i] : []);
        return {
          type: "scatter", mode: "markers", name: named(value, 34), x: here.map((i) => x[i]), y: here.map((i) => y[i]), customdata: here,
          marker: { color: spot(value, k), size: 7, opacity: 0.8, line: { width: 0 } }, hoverinfo: "text",
          hovertext: here.map((i) => `${chart.ids.length ? `<b>${named(chart.ids[i], 40)}</b><br>` : ""}${Object.entries(chart.facts).map(([fact, [v, c]]) => `${fact}: ${named(v[c[i]], 40)}`).join("<br>")}`),
        };
      });
      const bare = { showgrid: false, zeroline: false, showticklabels: false, ticks: "", fixedrange: false };
      return [traces, layout(chart, { xaxis: axis(across, bare), yaxis: axis(down, bare), margin: { l: 34, r: 10, t: 10, b: 34 }, height: 430, dragmode: width > 600 ? "zoom" : false })];
    },
  };

  // --- charts on the page ------------------------------------------------------------------------

  const state = new Map();

  async function draw(figure) {
    const chart = data.charts[figure.dataset.chart];
    const plot = $(".plot", figure);
    if (!chart || !plot || !plot.clientWidth) return;
    const own = state.get(figure) ?? setUp(figure, chart);
    const Plotly = await plotly();
    const [traces, frame] = build[chart.kind](chart, plot.clientWidth, own.focus, own);
    legend(figure, chart, own);
    const config = { displayModeBar: chart.kind === "points" && plot.clientWidth > 600, displaylogo: false, responsive: false, modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };
    own.width = plot.clientWidth;
    $("img.still", plot)?.remove();
    await Plotly.react(plot, traces, frame, config);
    plot.style.minHeight = "";
    figure.dataset.drawn = "true";
    if (chart.kind === "points" && !own.wired) {
      own.wired = true;
      for (const event of ["plotly_hover", "plotly_click"]) plot.on(event, (e) => show(figure, chart, e.points[0].customdata));
    }
  }

  function setUp(figure, chart) {
    const own = { focus: chart.series?.[0]?.name };
    const tools = $(".tools", figure);
    const choose = (label, values, key) => {
      const select = make("select", { "aria-label": label }, ...values.map((v) => make("option", { value: v }, short(v, 44))));
      select.addEventListener("change", () => { own[key] = select.value; draw(figure); });
      tools.append(make("label", {}, make("span", {}, label), select));
    };
    if (chart.kind === "points") {
      [own.way] = Object.keys(chart.layouts);
      [own.fact] = Object.keys(chart.facts);
      if (Object.keys(chart.layouts).length > 1) choose("Laid out by", Object.keys(chart.layouts), "way");
      choose("Coloured by", Object.keys(chart.facts), "fact");
      arrows(figure, chart);
    }
    state.set(figure, own);
    return own;
  }

  // The image of a point: by pointer, by touch, or with the arrow keys.
  function show(figure, chart, i) {
    const card = $(".picture", figure);
    const id = chart.ids[i];
    const source = id !== undefined && data.images[chart.dataset]?.[id];
    const facts = Object.entries(chart.facts).map(([fact, [values, codes]]) => make("span", {}, `${fact}: ${values[codes[i]]}`));
    const words = [...(id === undefined ? [] : [make("strong", {}, id)]), ...facts];
    card.replaceChildren(...(source ? [make("img", { src: `data:image/jpeg;base64,${source}`, alt: `image ${id}` })] : []), make("span", { class: "facts" }, ...words));
    card.dataset.point = i;
  }

  function arrows(figure, chart) {
    const plot = $(".plot", figure);
    const count = Object.values(chart.layouts)[0][2].length;
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const now = Number($(".picture", figure).dataset.point ?? (step > 0 ? -1 : 0));
      show(figure, chart, (now + step + count) % count);
    });
  }

  // --- a chart's data, one click away ------------------------------------------------------------

  function rows(chart) {
    const at = (axisOf, v) => axisOf.names.length ? axisOf.names[v] : v;
    switch (chart.kind) {
      case "lines": return [["series", chart.x.title, chart.y.title, "low", "high"], chart.series.flatMap((s) => s.x.map((x, i) => [s.name, at(chart.x, x), s.y[i], s.low[i] ?? "", s.high[i] ?? ""]))];
      case "dots": return [["row", "series", chart.x.title, "low", "high"], chart.series.flatMap((s) => s.x.map((x, i) => [chart.rows[s.y[i]], s.name, x, s.low[i] ?? "", s.high[i] ?? ""]))];
      case "bars": return [["foundation", "classifier", chart.y.title, "images of pre-training", "random"], chart.values.map((v, i) => [chart.foundations[i], chart.classifiers[i], v, chart.sizes[i] ?? "", chart.doubtful[i] ? "yes" : "no"])];
      case "heat": return [[chart.y.title || "row", chart.x.title || "column", "value", "share"], chart.shares.flatMap((r, i) => r.map((v, j) => [chart.y.names[i], chart.x.names[j], chart.texts[i][j], v]))];
      default: {
        const ways = Object.entries(chart.layouts);
        const facts = Object.entries(chart.facts);
        const count = ways[0][1][2].length;
        return [[...(chart.ids.length ? ["image"] : []), ...ways.flatMap(([w]) => [`${w} 1`, `${w} 2`]), ...facts.map(([f]) => f)],
          Array.from({ length: count }, (_, i) => [...(chart.ids.length ? [chart.ids[i]] : []), ...ways.flatMap(([, [, , x, y]]) => [x[i], y[i]]), ...facts.map(([, [v, c]]) => v[c[i]])])];
      }
    }
  }

  function fill(details) {
    if (details.dataset.filled) return;
    details.dataset.filled = "true";
    const chart = data.charts[details.closest("figure").dataset.chart];
    const [header, body] = rows(chart);
    const plain = (v) => /^[=+\-@\t\r]/.test(v) && Number.isNaN(Number(v)) ? `'${v}` : String(v ?? "");
    const text = [header, ...body].map((row) => row.map((v) => `"${plain(v).replaceAll('"', '""')}"`).join(",")).join("\r\n");
    const save = make("button", { type: "button" }, "Save as CSV");
    save.addEventListener("click", () => {
      const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: `${chart.name}.csv` });
      link.click();
      URL.revokeObjectURL(link.href);
    });
    const most = 400;
    const table = make("table", { class: "compact" },
      make("thead", {}, make("tr", {}, ...header.map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...body.slice(0, most).map((row) => make("tr", {}, ...row.map((v) => make("td", {}, String(v ?? "")))))));
    const more = body.length > most ? [make("p", { class: "muted" }, `The first ${most} of ${body.length} rows; all are in the file.`)] : [];
    details.append(save, make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Data of ${chart.title}` }, table), ...more);
  }

  // --- tables that are wider than the page -------------------------------------------------------

  const hint = "Wider than the page: scroll sideways for the rest.";
  function wide(box) {
    const more = box.scrollWidth - box.clientWidth > 2;
    box.classList.toggle("more", more && box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
    box.classList.toggle("less", more && box.scrollLeft > 2);
    const said = box.previousElementSibling;
    if (said?.matches(".sideways")) said.hidden = !more;
    else if (more) box.before(make("p", { class: "sideways" }, `${hint} \u2192`));
  }

  // --- start -------------------------------------------------------------------------------------

  document.documentElement.classList.add("scripted");
  $$("table.sortable").forEach(sortable);
  for (const td of $$("td[data-cell]")) td.own = JSON.parse(td.dataset.own);
  for (const select of $$("#scenario, #metric")) select.addEventListener("change", filter);
  filter();
  for (const section of $$("section.dataset")) {
    const first = $("article.result", section);
    if (first) pick(section, first.id);
    $("select.pick", section)?.addEventListener("change", (event) => pick(section, event.target.value));
  }
  for (const slot of $$("[data-image]")) {
    const source = data.images[slot.dataset.dataset]?.[slot.dataset.image];
    if (source) slot.prepend(make("img", { src: `data:image/jpeg;base64,${source}`, alt: `image ${slot.dataset.image}`, loading: "lazy" }));
    else slot.classList.add("bare");
  }
  for (const details of $$("details.data")) details.addEventListener("toggle", () => fill(details));
  addEventListener("hashchange", follow);
  follow();

  // Until a chart is drawn its file's picture stands there, as it does where no script runs.
  for (const figure of $$("figure.chart")) {
    const still = new DOMParser().parseFromString($("noscript", figure)?.textContent ?? "", "text/html").images[0];
    if (still) $(".plot", figure).append(still);
  }
  const atOnce = !("IntersectionObserver" in window) || matchMedia("(prefers-reduced-motion: reduce)").matches || matchMedia("print").matches;
  const seen = atOnce ? { observe: draw } : new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "400px" });
  const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const figure = target.closest("figure");
      if (atOnce && !figure.dataset.drawn && target.clientWidth) draw(figure);
      if (figure.dataset.drawn && target.clientWidth && Math.abs(state.get(figure).width - target.clientWidth) > 8) draw(figure);
    }
  });
  for (const figure of $$("figure.chart")) {
    seen.observe(figure);
    sized.observe($(".plot", figure));
  }
  const widths = new ResizeObserver((entries) => entries.forEach(({ target }) => wide(target)));
  for (const box of $$(".scroll")) {
    widths.observe(box);
    box.addEventListener("scroll", () => wide(box), { passive: true });
  }
  const again = () => $$("figure[data-drawn]").forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  const paper = (light) => { document.documentElement.classList.toggle("paper", light); return Promise.all($$("figure.chart").map(draw)); };
  matchMedia("print").addEventListener("change", (event) => paper(event.matches));
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
})();
