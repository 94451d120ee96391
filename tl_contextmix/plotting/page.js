// What pages share: CircuitsVis once it is needed, lists to choose from, keyboard, graphs.
"use strict";
const tlContextmix = (() => {
  let program;

  // CircuitsVis waits packed in the page, or, where there is none, in the notebook around it.
  const packed = () => document.getElementById("circuitsvis");

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function available() {
    if (!packed()) return Promise.resolve(false);
    if (packed().textContent) return Promise.resolve(true);
    return ask("is there", "here").then(() => true);
  }

  function circuitsvis() {
    return (program ??= load());
  }

  async function load() {
    const text = packed().textContent
      ? new TextDecoder().decode(await inflate(packed().textContent))
      : (await ask("program please", "program")).program;
    const script = document.createElement("script");
    script.textContent = text; // The policy of the page lets nothing but this very program run.
    document.head.append(script);
    return window.CircuitsVis;
  }

  // The notebook may load after this frame; it then says that it is there.
  function ask(question, answer) {
    return new Promise((resolve) => {
      if (parent === window) return;
      addEventListener("message", ({ data, source }) => {
        if (source !== parent) return;
        if (data?.tl_contextmix === answer) resolve(data);
        else if (data?.tl_contextmix === "here") parent.postMessage({ tl_contextmix: question }, "*");
      });
      parent.postMessage({ tl_contextmix: question }, "*");
    });
  }

  // CircuitsVis answers the pointer only, and names its small maps in a heading each.
  function nameThumbnails(holder, tries, then = () => {}) {
    const names = holder.querySelectorAll("h4");
    if (!names.length && tries > 0) {
      setTimeout(nameThumbnails, 50, holder, tries - 1, then);
      return;
    }
    for (const name of names) {
      const button = name.parentElement.parentElement;
      if (button.tabIndex === 0) continue;
      button.tabIndex = 0;
      button.setAttribute("role", "button");
      button.setAttribute("aria-label", "Show " + name.textContent);
      button.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          button.click();
        }
      });
    }
    then();
  }

  return { inflate, available, circuitsvis, nameThumbnails };
})();
(() => {
  const data = document.getElementById("charts");
  if (data) {
    const charts = JSON.parse(data.textContent);
    tlContextmix.available().then(async () => {
      await tlContextmix.circuitsvis();
      for (const chart of charts) {
        const holder = document.getElementById(chart.element);
        holder.parentElement.hidden = false;
        CircuitsVis.render(chart.element, CircuitsVis[chart.component], chart.props);
        holder.closest("article").querySelector("details").open = false;
      }
    });
  }

  // A notebook gives the frame the height of what is in it.
  if (parent !== window) {
    new ResizeObserver(() => {
      const height = document.documentElement.getBoundingClientRect().height;
      parent.postMessage({ tl_contextmix: "height", height: Math.ceil(height) }, "*");
    }).observe(document.documentElement);
  }

  for (const graph of document.querySelectorAll(".explored")) explore(graph);

  // A graph: its edges on sight of a node, its numbers once the node is kept.
  function explore(holder) {
    const { nodes, edges, ranked, drawn } = JSON.parse(holder.querySelector("script").textContent);
    const svg = holder.querySelector("svg");
    const layer = svg.querySelector(".edges");
    const shapes = [...svg.querySelectorAll(".node")];
    const detail = holder.querySelector(".detail");
    const range = holder.querySelector("[data-graph-range]");
    const rank = new Map(ranked.map((node, place) => [node, place]));
    const middle = (node) => {
      const box = shapes[node].firstElementChild.getBBox();
      return [box.x + box.width / 2, box.y + box.height / 2];
    };
    const at = nodes.map((_, node) => middle(node));
    const largest = edges.length ? Math.abs(edges[0][2]) : 1;
    const shown = (node) => (rank.get(node) ?? nodes.length) < Number(range.value);
    let kept = null;

    function show(node) {
      const mine = edges.filter(([from, to]) => from === node || to === node);
      const some = node === null ? edges.filter(([from, to]) => shown(from) && shown(to)) : mine;
      layer.replaceChildren(...some.slice(0, node === null ? drawn : undefined).reverse().map(path));
      const near = new Set(mine.flatMap(([from, to]) => [from, to]));
      shapes.forEach((shape, index) => {
        const seen = shown(index) || near.has(index) || index === node;
        shape.classList.toggle("gone", !seen);
        shape.classList.toggle("faded", node !== null && !near.has(index) && index !== node);
        shape.classList.toggle("kept", index === kept);
        shape.setAttribute("aria-pressed", index === kept);
      });
    }

    function path([from, to, value]) {
      const [[x1, y1], [x2, y2]] = [at[from], at[to]];
      const middle = y1 === y2 ? y1 + 17 : (y1 + y2) / 2;
      const line = document.createElementNS(svg.namespaceURI, "path");
      line.setAttribute("d", `M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`);
      line.setAttribute("stroke", value > 0 ? "#2166ac" : "#b2182b");
      line.setAttribute("stroke-width", 0.4 + (4.6 * Math.abs(value)) / largest);
      if (value < 0) line.setAttribute("stroke-dasharray", "4 3");
      line.dataset.edge = `${from} ${to}`;
      return line;
    }

    function keep(node) {
      kept = node === kept ? null : node;
      detail.replaceChildren(...(kept === null ? [] : facts(kept)));
      show(kept);
    }

    function facts(node) {
      const { label, at: where, value, facts } = nodes[node];
      const list = element("dl");
      for (const [name, text] of [["effect", signed(value)], ...facts])
        list.append(element("dt", name), element("dd", text));
      const tables = element("div");
      tables.className = "tables";
      tables.append(
        ends("from", edges.filter(([, to]) => to === node), 0),
        ends("to", edges.filter(([from]) => from === node), 1),
      );
      return [element("h4", `${label}, ${where}`), list, tables];
    }

    function ends(heading, some, side) {
      const table = element("table");
      const sum = some.reduce((total, edge) => total + edge[2], 0);
      const rows = some.slice(0, 12).map((edge) => {
        const { label, at: where } = nodes[edge[side]];
        return [`${label}, ${where}`, edge[2]];
      });
      const rest = some.slice(12).reduce((total, edge) => total + edge[2], 0);
      if (some.length > 12) rows.push([`${some.length - 12} others`, rest]);
      rows.push(["sum", sum]);
      const head = element("tr");
      head.append(element("th", heading), element("th", "effect"));
      table.append(head);
      for (const [name, value] of rows) {
        const row = element("tr");
        const cell = element("td", signed(value));
        cell.className = "number";
        row.append(element("td", name), cell);
        table.append(row);
      }
      return table;
    }

    // Left and right: the next node that is shown; up and down: along the largest edge.
    function walk(node, key) {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (step) {
        const count = nodes.length;
        for (let next = (node + step + count) % count; next !== node; next = (next + step + count) % count)
          if (shown(next)) return next;
        return node;
      }
      const [mine, other] = key === "ArrowUp" ? [0, 1] : [1, 0];
      const found = edges.find((edge) => edge[mine] === node && shown(edge[other]));
      return found ? found[other] : node;
    }

    shapes.forEach((shape, node) => {
      shape.setAttribute("tabindex", node === ranked[0] ? 0 : -1);
      shape.addEventListener("pointerenter", () => show(node));
      shape.addEventListener("pointerleave", () => show(kept));
      shape.addEventListener("focus", () => show(node));
      shape.addEventListener("blur", () => show(kept));
      shape.addEventListener("click", () => keep(node));
      shape.addEventListener("keydown", (event) => {
        const { key } = event;
        if (!["Enter", " ", "Escape", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"].includes(key)) return;
        event.preventDefault();
        if (key === "Escape") {
          if (kept !== null) keep(kept);
        } else if (key.startsWith("Arrow")) {
          const next = walk(node, key);
          shapes[node].tabIndex = -1;
          shapes[next].tabIndex = 0;
          shapes[next].focus();
        } else {
          keep(node);
        }
      });
    });
    range.addEventListener("input", () => {
      range.parentElement.querySelector("output").textContent = `${range.value} of ${nodes.length}`;
      show(kept);
    });
  }

  function element(tag, text = "") {
    const found = document.createElement(tag);
    found.textContent = text;
    return found;
  }

  function signed(value) {
    if (value === null) return "no number";
    const size = Math.abs(value).toPrecision(3);
    return value < 0 ? "\u2212" + size : "+" + size;
  }
})();
