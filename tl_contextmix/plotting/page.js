// What CircuitsVis and the pictures leave out: drawing from data, sheets, keyboard, cell names.
"use strict";
(() => {
  const data = document.getElementById("charts");
  if (data) drawNext(JSON.parse(data.textContent));

  // One after the other: what is drawn already can be used while the rest is on its way.
  function drawNext([chart, ...rest]) {
    if (!chart) return;
    CircuitsVis.render(chart.element, CircuitsVis[chart.component], chart.props);
    nameThumbnails(document.getElementById(chart.element), 40);
    setTimeout(drawNext, 0, rest);
  }

  // CircuitsVis answers the pointer only, and names its small maps in a heading each.
  function nameThumbnails(holder, tries) {
    const names = holder.querySelectorAll("h4");
    if (!names.length && tries > 0) {
      setTimeout(nameThumbnails, 50, holder, tries - 1);
      return;
    }
    for (const name of names) {
      const button = name.parentElement.parentElement;
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
  }

  for (const select of document.querySelectorAll("select[data-sheets]")) {
    const sheets = select.closest(".sheets").querySelectorAll(":scope > .sheet");
    const choose = () => sheets.forEach((sheet, i) => (sheet.hidden = i !== select.selectedIndex));
    select.addEventListener("change", choose);
    choose(); // A browser may remember the choice of an earlier visit.
  }

  for (const picture of document.querySelectorAll(".pictures")) {
    const axes = JSON.parse(picture.dataset.axes);
    const indices = new Map(axes.colours.map((colour, index) => [colour, index]));
    for (const image of picture.querySelectorAll("img")) {
      image.addEventListener("pointermove", (event) => {
        const box = image.getBoundingClientRect();
        const place = (offset, size, count) =>
          Math.min(count - 1, Math.max(0, Math.floor((offset / size) * count)));
        const row = place(event.clientY - box.top, box.height, image.naturalHeight);
        const column = place(event.clientX - box.left, box.width, image.naturalWidth);
        const index = indices.get(colourOf(image, row, column));
        image.nextElementSibling.textContent =
          `row ${named(axes.rows, row)}, column ${named(axes.columns, column)}: ` +
          (axes.block > 1 ? "farthest from 0 " : "") + told(index, axes);
      });
    }

    function named(names, place) {
      const [first, last] = [place * axes.block, (place + 1) * axes.block - 1];
      const end = names[Math.min(last, names.length - 1)];
      return last > first ? `${names[first]} to ${end}` : names[first];
    }
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

  function colourOf(image, row, column) {
    if (!image.pixels) {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      image.pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    }
    const at = 4 * (row * image.naturalWidth + column);
    const [red, green, blue] = image.pixels.slice(at, at + 3);
    return (red << 16) | (green << 8) | blue;
  }

  // No two steps of the scale have the same colour, so that the colour is the number.
  function told(index, { steps, largest }) {
    if (!(index <= 2 * steps)) return index === 2 * steps + 1 ? "infinite" : "no number";
    const share = (index - steps) / steps;
    return "about " + (share * Math.abs(share) * largest).toPrecision(2);
  }
})();
