// Maps: drawn from their numbers, linked by layer and token, read out as the arrays have them.
"use strict";
(() => {
  const SCALES = {
    rank: "rank",
    log: "logarithm",
    value: "value",
    share: "share of its row",
  };
  // What the reader chose: for the whole page, but for layers, which each section has its own of.
  const chosen = { scale: "rank", first: true, token: null, drawer: "page" };
  const sections = [];
  const root = document.documentElement;

  start();

  async function start() {
    for (const panels of document.querySelectorAll(".panels")) {
      const holders = [...panels.querySelectorAll(".map")];
      if (!holders.length) continue;
      const section = { panels, maps: [], key: null, opens: JSON.parse(panels.dataset.opens || "{}") };
      sections.push(section);
      for (const holder of holders) section.maps.push(await mapIn(holder, section));
      addBar(section);
    }
    readAddress();
    // A link to a section is none to a layer, and leaves what was chosen.
    addEventListener("hashchange", () => /[#&](layer|target)=/.test(location.hash) && readAddress());
    let wide = innerWidth;
    addEventListener("resize", () => innerWidth !== wide && ((wide = innerWidth), drawAll()));
    for (const query of ["(prefers-color-scheme: dark)", "print"])
      matchMedia(query).addEventListener("change", drawAll);
    if (sections.length && (await tlContextmix.available())) offerCircuitsVis();
  }

  // ---- what there is

  async function mapIn(holder, section) {
    const told = JSON.parse(holder.querySelector("script").textContent);
    const [sheets, rows, columns] = told.shape;
    const size = rows * columns;
    const bytes = await tlContextmix.inflate(told.cells);
    const count = sheets * size;
    const words = new Uint32Array(count);
    for (let plane = 0; plane < 4; plane++)
      for (let at = 0; at < count; at++) words[at] |= bytes[plane * count + at] << (24 - 8 * plane);
    const values = new Float32Array(words.buffer);
    const hidden = bytes.length > 4 * count ? bytes.subarray(4 * count) : null;
    const map = { ...told, holder, section, values, hidden, sheet: 0, cursor: null, depths: {} };
    map.title = holder.closest("article").querySelector("h3").textContent;
    map.signed = values.some((value) => value < 0);
    build(map);
    return map;
  }

  function build(map) {
    const { holder } = map;
    map.thumbs = element("div", "", "thumbs");
    map.legend = element("p", "", "legend");
    map.canvas = element("canvas", "", "zoom");
    map.canvas.tabIndex = 0;
    map.canvas.setAttribute("role", "img");
    map.telling = element("p", "", "telling");
    map.telling.setAttribute("aria-live", "polite");
    map.name = element("h4");
    const scroll = element("div", "", "scroll");
    scroll.append(map.canvas);
    map.own = element("div");
    map.own.append(map.name, scroll);
    map.cv = element("div", "", "cv");
    map.cv.hidden = true;
    const numbers = element("details");
    numbers.append(element("summary", "Numbers of this map"), element("div", "", "scroll"));
    numbers.addEventListener("toggle", () => fillNumbers(map));
    map.numbers = numbers;
    const pieces = [map.legend, map.thumbs, map.own, map.cv, map.telling];
    if (map.block === 1 && map.shape[1] * map.shape[2] <= 8000) pieces.push(numbers);
    holder.append(...pieces);
    if (map.sheets.length > 1) addThumbs(map);
    map.canvas.addEventListener("pointermove", (event) => point(map, cellAt(map, event)));
    map.canvas.addEventListener("pointerleave", () => point(map, null));
    map.canvas.addEventListener("click", (event) => {
      const found = placeAt(map, event);
      if (found) choose(tokenOf(map, found.row, found.column));
    });
    map.canvas.addEventListener("keydown", (event) => walk(map, event));
    map.canvas.addEventListener("blur", () => point(map, null));
  }

  function addThumbs(map) {
    map.buttons = map.sheets.map((name, sheet) => {
      const button = element("button");
      button.type = "button";
      const picture = element("canvas", "", "thumb");
      [picture.width, picture.height] = [map.shape[2], map.shape[1]];
      button.append(picture, element("span", name));
      button.setAttribute("aria-label", `Show ${name}`);
      button.addEventListener("click", () => show(map, sheet));
      return button;
    });
    map.thumbs.append(...map.buttons);
  }

  function addBar(section) {
    const bar = element("div", "", "bar");
    const words = sentence(section);
    if (words.length) {
      const line = element("p", "", "words");
      line.append(
        ...words.map((word) => {
          const button = element("button", word.token);
          button.type = "button";
          button.dataset.position = word.position;
          button.title = `position ${word.position}: mark its row and column`;
          button.addEventListener("click", () => choose(word));
          return button;
        }),
      );
      bar.append(line);
    }
    section.words = words;
    const layers = section.maps.filter((map) => map.layers.length > 1);
    if (layers.length) {
      const most = layers.reduce((a, b) => (b.sheets.length > a.sheets.length ? b : a));
      section.select = choice("Layer", [], (at) => show(most, Number(at)));
      most.sheets.forEach((name, at) => section.select.append(option(at, name)));
      section.shown = most;
      bar.append(section.select.parentElement);
    }
    section.scales = choice("Colour by", Object.entries(SCALES), (name) => {
      chosen.scale = name;
      drawAll();
    });
    bar.append(section.scales.parentElement);
    if (section.maps.some(firsts)) {
      const label = element("label", "", "chooser");
      section.first = element("input");
      section.first.type = "checkbox";
      section.first.addEventListener("change", () => {
        chosen.first = !section.first.checked;
        drawAll();
      });
      label.append(section.first, " hide the first token");
      bar.append(label);
    }
    section.bar = bar;
    section.panels.before(bar);
  }

  function offerCircuitsVis() {
    for (const section of sections) {
      if (!section.maps.some((map) => "causal" in map)) continue;
      const drawers = [["page", "this page"], ["circuitsvis", "CircuitsVis"]];
      section.drawers = choice("Drawn by", drawers, (name) => {
        chosen.drawer = name;
        drawAll();
      });
      section.bar.append(section.drawers.parentElement);
    }
  }

  // ---- what is chosen

  function show(map, sheet) {
    const { section } = map;
    map.sheet = sheet;
    if (map.layers.length) {
      section.key = [map.layers[sheet], map.heads[sheet] ?? null];
      for (const other of section.maps) if (other !== map) follow(other, section.key);
    }
    section.maps.forEach(draw);
    writeAddress(section);
  }

  function follow(map, [layer, head]) {
    const same = (at, one) => map.layers[at] === layer && (map.heads[at] ?? null) === one;
    const places = map.sheets.map((_, at) => at);
    const found = places.find((at) => same(at, head)) ?? places.find((at) => map.layers[at] === layer);
    if (found !== undefined) map.sheet = found;
  }

  function choose(token) {
    const same = token && chosen.token && sameToken(token, chosen.token);
    chosen.token = same ? null : token;
    drawAll();
    writeAddress(sections.find((one) => one.key) ?? sections[0]);
  }

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    const layer = given.get("layer"), target = given.get("target");
    for (const section of sections) {
      const opens = section.opens;
      const key = layer !== null ? [Number(layer), given.get("head")] : [opens.layer, opens.head ?? null];
      const position = target !== null ? Number(target) : opens.target;
      if (key[0] !== undefined && key[0] !== null) {
        section.key = key;
        section.maps.forEach((map) => follow(map, key));
      }
      const found = section.words.find((word) => word.position === position);
      if (found && (target !== null || !chosen.token)) chosen.token = found;
    }
    drawAll();
    const wanted = given.get("section");
    if (wanted) document.getElementById(`section-${wanted}`)?.scrollIntoView();
  }

  function writeAddress(section) {
    const parts = new URLSearchParams();
    if (section?.key) {
      parts.set("layer", section.key[0]);
      if (section.key[1] !== null) parts.set("head", section.key[1]);
    }
    if (chosen.token) parts.set("target", chosen.token.position);
    // The page of `tl-contextmix explore` keeps it in an address of its own.
    if (parent !== window) parent.postMessage({ tl_contextmix: "place", place: String(parts) }, "*");
    try {
      history.replaceState(null, "", `#${parts}`);
    } catch {
      // A frame of a notebook has no address.
    }
  }

  const sameToken = (a, b) => a.position === b.position && a.token === b.token;

  // The token of a row, or of a column where rows are no tokens.
  function tokenOf(map, row, column) {
    const axes = [["rows", map.rows, map.rowPositions, row], ["columns", map.columns, map.columnPositions, column]];
    for (const [axis, names, positions, at] of axes)
      if (at !== null && map.block === 1 && map.tokens.includes(axis) && positions[at] >= 0)
        return { token: names[at], position: positions[at] };
    return null;
  }

  // The tokens of a section's widest map.
  function sentence(section) {
    let found = [];
    for (const map of section.maps) {
      if (!map.tokens.includes("columns")) continue;
      const words = map.columns.map((token, at) => ({ token, position: map.columnPositions[at] }));
      const real = words.filter((word) => word.position >= 0);
      if (real.length > found.length) found = real;
    }
    return found;
  }

  const placeOf = (map, axis) => {
    if (!chosen.token || !map.tokens.includes(axis) || map.block > 1) return -1;
    const positions = axis === "rows" ? map.rowPositions : map.columnPositions;
    const names = axis === "rows" ? map.rows : map.columns;
    return names.findIndex((token, at) => sameToken({ token, position: positions[at] }, chosen.token));
  };

  // ---- scales

  // Whether the first token, or a sink that is no token, is a column that can be left out.
  const isFirst = (map, column) => map.columnPositions[column] <= 0 && map.tokens.includes("columns");
  const firsts = (map) => map.block === 1 && map.columns.length > 1 && isFirst(map, 0);

  function leftOut(map, row, column) {
    if (chosen.first || map.block > 1 || !map.tokens.includes("columns")) return false;
    if (isFirst(map, column)) return true;
    return map.tokens.includes("rows") && map.rowPositions[row] === 0 && map.rows[row] === firstToken(map);
  }

  const firstToken = (map) => map.columns[map.columnPositions.indexOf(0)];

  // A row with one readable cell is forced to what it is, and the first token takes what nobody needs.
  function forced(map, row, column) {
    if (!map.tokens.includes("columns") || map.block > 1) return false;
    if (isFirst(map, column) && map.columns.length > 2) return true;
    if (!map.readable) {
      map.readable = Array.from({ length: map.shape[1] }, (_, at) => {
        let count = 0;
        for (let other = 0; other < map.shape[2]; other++) if (!isHidden(map, at, other)) count++;
        return count;
      });
    }
    return map.readable[row] < 2;
  }

  const isHidden = (map, row, column) => !!map.hidden?.[row * map.shape[2] + column];

  // Colours from -1 to 1 for every cell, and what they stand for.
  function scaleOf(map) {
    const name = `${chosen.scale} ${chosen.first}`;
    return (map.depths[name] ??= measured(map));
  }

  function measured(map) {
    const [sheets, rows, columns] = map.shape;
    const size = rows * columns;
    const shown = chosen.scale === "share" ? sharesOf(map) : map.values;
    const counted = [];
    let top = 0, beyond = 0, above = 0, nothing = false;
    each((at, row, column) => {
      const value = Math.abs(shown[at]);
      nothing ||= Number.isNaN(value);
      if (!Number.isFinite(value)) return;
      if (value > 0) counted.push(value);
      if (value > beyond) beyond = value;
      if (value > top && !forced(map, row, column)) top = value;
    });
    counted.sort((a, b) => a - b);
    top ||= beyond;
    if (chosen.scale !== "value" && chosen.scale !== "share") top = beyond;
    const floor = counted[Math.floor(counted.length / 20)] ?? 0;
    const depth = {
      rank: (value) => (upTo(counted, value) / counted.length) ** 2,
      log: (value) => (top > floor ? Math.log(value / floor) / Math.log(top / floor) : 1),
    }[chosen.scale] ?? ((value) => value / top);
    const depths = new Float32Array(map.values.length);
    let below = 0;
    each((at) => {
      const value = shown[at], wide = Math.abs(value);
      if (!Number.isFinite(value)) depths[at] = value;
      else {
        if (wide > top) above++;
        if (chosen.scale === "log" && wide < floor) below++;
        depths[at] = value ? Math.sign(value) * Math.min(1, Math.max(0, depth(wide))) : 0;
      }
    });
    const half = counted[Math.floor(counted.length / 2)] ?? 0;
    return { depths, shown, top, beyond, above, nothing, floor, below, half };

    function each(use) {
      for (let sheet = 0; sheet < sheets; sheet++)
        for (let row = 0; row < rows; row++)
          for (let column = 0; column < columns; column++)
            if (!isHidden(map, row, column) && !leftOut(map, row, column))
              use(sheet * size + row * columns + column, row, column);
    }
  }

  function upTo(sorted, value) {
    let [low, high] = [0, sorted.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  function sharesOf(map) {
    const [, rows, columns] = map.shape;
    const found = new Float32Array(map.values.length);
    for (let start = 0; start < found.length; start += columns) {
      const row = (start / columns) % rows;
      let sum = 0;
      for (let column = 0; column < columns; column++)
        if (!isHidden(map, row, column) && !leftOut(map, row, column)) sum += Math.abs(map.values[start + column]);
      for (let column = 0; column < columns; column++)
        found[start + column] = sum ? map.values[start + column] / sum : map.values[start + column] && NaN;
    }
    return found;
  }

  // ---- drawing

  function drawAll() {
    for (const section of sections) {
      section.maps.forEach(draw);
      section.scales.value = chosen.scale;
      if (section.first) section.first.checked = !chosen.first;
      if (section.drawers) section.drawers.value = chosen.drawer;
      for (const button of section.bar.querySelectorAll(".words button")) {
        const mine = { token: button.textContent, position: Number(button.dataset.position) };
        button.setAttribute("aria-pressed", !!chosen.token && sameToken(mine, chosen.token));
      }
    }
  }

  function draw(map) {
    const { section } = map;
    if (section.select && section.shown === map) section.select.value = map.sheet;
    map.scale = scaleOf(map);
    drawLegend(map);
    drawThumbs(map);
    const foreign = chosen.drawer === "circuitsvis" && "causal" in map && window.CircuitsVis;
    if (chosen.drawer === "circuitsvis" && "causal" in map && !foreign) tlContextmix.circuitsvis().then(() => draw(map));
    map.own.hidden = map.thumbs.hidden = !!foreign;
    map.cv.hidden = !foreign;
    if (foreign) drawWithCircuitsVis(map);
    else drawZoom(map);
    tell(map);
    if (map.numbers.open) fillNumbers(map);
    map.holder.dataset.ready = map.sheets[map.sheet];
  }

  function drawLegend(map) {
    const { scale } = map;
    const { top, above, beyond, below, nothing, floor, half } = scale;
    const what = chosen.scale === "share" ? "share of its row" : map.unit;
    const pieces = [];
    if (!beyond) pieces.push(element("span", "every number is 0"));
    else {
      const ramp = element("i", "", map.signed ? "ramp signed" : "ramp");
      pieces.push(element("span", map.signed ? about(-top) : "0"), ramp, element("span", about(top)));
    }
    if (what) pieces.push(element("span", what, "unit"));
    const notes = {
      rank: half && `colour by rank: half of the numbers are below ${about(half)}`,
      log: floor && `logarithmic; white below ${about(floor)} (${below} cells)`,
    };
    const note = [notes[chosen.scale] || ""];
    if (above) note.push(`${above} cells beyond the scale, up to ${about(beyond)}`);
    if (!chosen.first && firsts(map)) note.push("without the first token");
    const text = note.filter(Boolean).join("; ");
    if (text && beyond) pieces.push(element("span", text, "how"));
    for (const [test, kind, meaning] of [
      [map.hidden?.some(Boolean), "masked", "later token, cannot be read"],
      [nothing, "nothing", "no number"],
      [map.values.some((value) => Math.abs(value) === Infinity), "infinite", "infinite"],
    ])
      if (test) {
        const key = element("span", "", "key");
        key.append(element("i", "", kind), ` ${meaning}`);
        pieces.push(key);
      }
    map.legend.replaceChildren(...pieces);
  }

  function palette() {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const parts = (name) => [1, 3, 5].map((at) => parseInt(colour(name).slice(at, at + 2), 16));
    return {
      ink: colour("--ink"), soft: colour("--soft"), line: colour("--line"), accent: colour("--mark"),
      zero: parts("--zero"), up: parts("--up"), down: parts("--down"),
      masked: parts("--masked"), nothing: parts("--nothing"), infinite: parts("--infinite"),
    };
  }

  function shade(map, at, place, colours) {
    if (map.hidden?.[place]) return colours.masked;
    const columns = map.shape[2];
    if (leftOut(map, Math.floor(place / columns), place % columns)) return colours.zero;
    const depth = map.scale.depths[at];
    if (Number.isNaN(depth)) return colours.nothing;
    if (Math.abs(depth) === Infinity) return colours.infinite;
    const end = depth < 0 ? colours.down : colours.up;
    return colours.zero.map((part, i) => Math.round(part + (end[i] - part) * Math.abs(depth)));
  }

  // One pixel for each cell.
  function paint(map, sheet, picture, colours) {
    const [, rows, columns] = map.shape;
    const size = rows * columns;
    const image = new ImageData(columns, rows);
    for (let place = 0; place < size; place++) {
      const [red, green, blue] = shade(map, sheet * size + place, place, colours);
      image.data.set([red, green, blue, 255], 4 * place);
    }
    [picture.width, picture.height] = [columns, rows];
    picture.getContext("2d").putImageData(image, 0, 0);
  }

  function drawThumbs(map) {
    if (!map.buttons) return;
    const colours = palette();
    map.buttons.forEach((button, sheet) => {
      paint(map, sheet, button.firstChild, colours);
      button.setAttribute("aria-pressed", sheet === map.sheet);
    });
  }

  // How a map is laid out: cells first, names of rows at their left, of columns below them.
  function layout(map, context) {
    const [, rows, columns] = map.shape;
    const names = ["rows", "columns"].map((axis) => map[axis].map((_, at) => nameOf(map, axis, at)));
    const wide = (texts) => texts.reduce((most, text) => Math.max(most, context.measureText(text).width), 0);
    const room = Math.max(200, map.own.clientWidth || 600);
    const left = Math.min(wide(names[0]), 150, room * 0.3) + 10;
    const below = Math.min(wide(names[1]), 120) + 12;
    const width = Math.max(columns > 400 ? 1.2 : 2.5, Math.min(58, (room - left - 8) / columns));
    const height = Math.max(rows <= 24 ? 16 : Math.min(width, 16), Math.min(width, 34));
    return { rows, columns, names, left, below, width, height };
  }

  function nameOf(map, axis, at) {
    const positions = axis === "rows" ? map.rowPositions : map.columnPositions;
    const size = map.shape[axis === "rows" ? 1 : 2];
    const name = (place) => {
      const numbered = map.tokens.includes(axis) && positions[place] >= 0;
      return numbered ? `${cut(map[axis][place])} (${positions[place]})` : cut(map[axis][place]);
    };
    if (map.block === 1) return name(at);
    if (at >= size) return "";
    return `${name(at * map.block)} to ${name(Math.min((at + 1) * map.block, map[axis].length) - 1)}`;
  }

  function cut(text) {
    const letters = [...text];
    const short = letters.length > 24 ? letters.slice(0, 23).join("") + "…" : text;
    // Isolated, a right-to-left token leaves the number beside it where it is.
    return /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(short) ? `\u2068${short}\u2069` : short;
  }

  function drawZoom(map) {
    const colours = palette();
    const context = map.canvas.getContext("2d");
    const font = '12px system-ui, -apple-system, "Segoe UI", "Noto Sans", Roboto, sans-serif';
    context.font = font;
    const at = (map.at = layout(map, context));
    const [across, down] = [at.columns * at.width, at.rows * at.height];
    const [whole, high] = [Math.ceil(at.left + across + 8), Math.ceil(down + at.below + 4)];
    const sharp = window.devicePixelRatio || 1;
    [map.canvas.width, map.canvas.height] = [whole * sharp, high * sharp];
    map.canvas.style.width = `${whole}px`;
    map.canvas.style.height = `${high}px`;
    context.scale(sharp, sharp);
    context.imageSmoothingEnabled = false;
    const picture = element("canvas");
    paint(map, map.sheet, picture, colours);
    context.drawImage(picture, at.left, 0, across, down);
    context.strokeStyle = colours.line;
    context.strokeRect(at.left + 0.5, 0.5, across - 1, down - 1);
    context.font = font;
    context.textBaseline = "middle";
    drawNumbers(map, context, at, colours);
    drawNames(map, context, at, colours);
    drawSides(map, context, at, colours);
    drawMarks(map, context, at, colours);
    map.name.textContent = map.sheets.length > 1 ? map.sheets[map.sheet] : "";
    map.canvas.setAttribute("aria-label", `${map.title}, ${map.sheets[map.sheet]}: arrow keys read cells, Enter marks a token`);
  }

  function drawNumbers(map, context, at, colours) {
    if (at.width < 40 || map.block > 1) return;
    context.textAlign = "center";
    const size = at.rows * at.columns;
    for (let place = 0; place < size; place++) {
      const [row, column] = [Math.floor(place / at.columns), place % at.columns];
      if (map.hidden?.[place] || leftOut(map, row, column)) continue;
      const index = map.sheet * size + place;
      const ground = shade(map, index, place, colours);
      context.fillStyle = 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 140 ? "#000" : "#fff";
      context.fillText(brief(map.scale.shown[index]), at.left + (column + 0.5) * at.width, (row + 0.5) * at.height);
    }
  }

  function drawNames(map, context, at, colours) {
    const marked = [placeOf(map, "rows"), placeOf(map, "columns")];
    context.textAlign = "right";
    const every = [Math.ceil(13 / at.height), Math.ceil(13 / at.width)];
    at.names[0].slice(0, at.rows).forEach((name, row) => {
      if (row % every[0] && row !== marked[0]) return;
      context.fillStyle = row === marked[0] ? colours.accent : colours.ink;
      context.fillText(fit(context, name, at.left - 8), at.left - 5, (row + 0.5) * at.height);
    });
    at.names[1].slice(0, at.columns).forEach((name, column) => {
      if (column % every[1] && column !== marked[1]) return;
      context.save();
      context.translate(at.left + (column + 0.5) * at.width, at.rows * at.height + 5);
      context.rotate(-Math.PI / 2);
      context.fillStyle = column === marked[1] ? colours.accent : colours.ink;
      context.fillText(fit(context, name, at.below - 6), 0, 0);
      context.restore();
    });
  }

  function fit(context, text, room) {
    if (context.measureText(text).width <= room) return text;
    const letters = [...text];
    while (letters.length > 1 && context.measureText(`${letters.join("")}…`).width > room) letters.pop();
    return `${letters.join("")}…`;
  }

  function drawSides(map, context, at, colours) {
    let edge = 0;
    for (const [, length] of map.sides.slice(0, -1)) {
      edge += length / map.block;
      context.fillStyle = colours.ink;
      context.fillRect(at.left + edge * at.width - 0.75, 0, 1.5, at.rows * at.height);
    }
  }

  function drawMarks(map, context, at, colours) {
    const [row, column] = [placeOf(map, "rows"), placeOf(map, "columns")];
    context.lineWidth = 2;
    context.strokeStyle = colours.accent;
    if (row >= 0) context.strokeRect(at.left, row * at.height, at.columns * at.width, at.height);
    if (column >= 0) context.strokeRect(at.left + column * at.width, 0, at.width, at.rows * at.height);
    if (!map.cursor) return;
    context.strokeStyle = colours.ink;
    context.strokeRect(at.left + map.cursor[1] * at.width, map.cursor[0] * at.height, at.width, at.height);
  }

  // CircuitsVis colours by value / bound and reads out the value: it gets numbers that count as
  // their colour and read as themselves.
  function drawWithCircuitsVis(map) {
    const [sheets, rows, columns] = map.shape;
    const size = rows * columns;
    const cell = (at) =>
      Object.assign(new Number(map.scale.depths[at] || 0), { toString: () => read(map.values[at]) });
    const attention = Array.from({ length: sheets }, (_, sheet) =>
      Array.from({ length: rows }, (_, row) =>
        Array.from({ length: columns }, (_, column) => cell(sheet * size + row * columns + column)),
      ),
    );
    map.cv.style.maxWidth = `${Math.min(860, 150 + 58 * columns)}px`;
    map.cv.classList.toggle("single", sheets === 1);
    map.cv.id ||= `cv-map-${[...document.querySelectorAll(".map")].indexOf(map.holder)}`;
    CircuitsVis.render(map.cv.id, CircuitsVis.AttentionHeads, {
      tokens: map.rows.map((token) => harmless(cut(token))),
      attention,
      attentionHeadNames: map.sheets.map(harmless),
      // One on either side of zero: 0 / 0 would make a cell invisible.
      maxValue: 1,
      minValue: -1,
      positiveColor: "#2166ac",
      negativeColor: "#b2182b",
      // Never omitted: the default hides what an encoder reads from later tokens.
      maskUpperTri: map.causal,
    });
    tlContextmix.nameThumbnails(map.cv, 40, () => {
      const names = map.cv.querySelectorAll("h4");
      names[map.sheet]?.parentElement.parentElement.click();
      names.forEach((name, sheet) => (name.parentElement.parentElement.onclick ??= (event) => event.isTrusted && show(map, sheet)));
    });
  }

  // CircuitsVis puts text into the page as markup, and on canvases as text: a WORD JOINER leaves
  // nothing that could be read as a tag, and takes up no room.
  const harmless = (text) => text.replaceAll("<", "<\u2060").replaceAll("&", "&\u2060");

  // ---- reading

  function placeAt(map, event) {
    const box = map.canvas.getBoundingClientRect();
    const { left, width, height, rows, columns } = map.at;
    const row = Math.floor((event.clientY - box.top) / height);
    const column = Math.floor((event.clientX - box.left - left) / width);
    const inRows = row >= 0 && row < rows, inColumns = column >= 0 && column < columns;
    if (!inRows && !inColumns) return null;
    return { row: inRows ? row : null, column: inColumns ? column : null };
  }

  function cellAt(map, event) {
    const found = placeAt(map, event);
    return found && found.row !== null && found.column !== null ? [found.row, found.column] : null;
  }

  function point(map, cell) {
    if (String(cell) === String(map.cursor)) return;
    map.cursor = cell;
    drawZoom(map);
    tell(map);
  }

  function walk(map, event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Enter" && map.cursor) choose(tokenOf(map, ...map.cursor));
    if (event.key === "Escape") choose(null);
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    const start = map.cursor ?? [Math.max(0, placeOf(map, "rows")) - down, -right];
    const held = (at, count) => Math.min(count - 1, Math.max(0, at));
    point(map, [held(start[0] + down, map.shape[1]), held(start[1] + right, map.shape[2])]);
  }

  function tell(map) {
    const { telling, cursor } = map;
    delete telling.dataset.value;
    if (!cursor) {
      telling.textContent = chosen.drawer === "circuitsvis" && !map.cv.hidden
        ? "Point at a small map to see it large; click to keep it."
        : "Point at a cell to read it; click a token to mark its row and column.";
      return;
    }
    const [row, column] = cursor;
    const place = row * map.shape[2] + column;
    const index = map.sheet * map.shape[1] * map.shape[2] + place;
    const value = map.values[index];
    const where = `row ${nameOf(map, "rows", row)}, column ${nameOf(map, "columns", column)}: `;
    let what = "later token, cannot be read";
    if (!map.hidden?.[place]) {
      telling.dataset.value = value;
      const share = map.block > 1 ? NaN : sharesOf(map)[index];
      what = `${map.block > 1 ? "farthest from 0 " : ""}${read(value)}${map.unit ? ` ${map.unit}` : ""}`;
      if (Number.isFinite(share)) what += `; ${(100 * share).toPrecision(3)} % of its row`;
      if (leftOut(map, row, column)) what = `${read(value)}, left out`;
    }
    telling.textContent = where + what;
  }

  function fillNumbers(map) {
    if (!map.numbers.open) return;
    const [, rows, columns] = map.shape;
    const table = element("table", "", "heat");
    const head = element("tr");
    head.append(element("td"), ...map.columns.map((_, at) => heading(nameOf(map, "columns", at), "col")));
    table.append(head);
    for (let row = 0; row < rows; row++) {
      const line = element("tr");
      line.append(heading(nameOf(map, "rows", row), "row"));
      for (let column = 0; column < columns; column++) {
        const place = row * columns + column;
        const value = map.values[map.sheet * rows * columns + place];
        const cell = element("td", map.hidden?.[place] ? "" : brief(value), map.hidden?.[place] ? "masked" : "");
        if (!map.hidden?.[place] && Number.isFinite(value)) cell.dataset.value = value;
        line.append(cell);
      }
      table.append(line);
    }
    const scroll = map.numbers.querySelector("div");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `${map.title}, ${map.sheets[map.sheet]}, numbers`);
    scroll.replaceChildren(element("h4", map.sheets[map.sheet]), table);
  }

  // ---- pieces

  function read(value) {
    if (Number.isNaN(value)) return "no number";
    if (Math.abs(value) === Infinity) return value < 0 ? "\u2212∞" : "∞";
    const wide = Math.abs(value);
    const text = value === 0 ? "0" : wide >= 1e-4 && wide < 1e6 ? String(Number(wide.toPrecision(4))) : wide.toExponential(2);
    return value < 0 ? `\u2212${text}` : text;
  }

  const about = (value) => read(Number(value.toPrecision(3)));

  function brief(value) {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "–" : read(value);
    const wide = Math.abs(value);
    let text = "0";
    if (wide >= 999.5) text = wide.toExponential(0);
    else if (wide >= 99.5) text = wide.toFixed(0);
    else if (wide >= 0.0095) text = wide.toFixed(wide >= 9.95 ? 1 : 2);
    else if (wide) text = wide.toExponential(0);
    return value < 0 ? `\u2212${text}` : text;
  }

  function element(tag, text = "", kind = "") {
    const found = document.createElement(tag);
    found.textContent = text;
    if (kind) found.className = kind;
    return found;
  }

  function heading(text, scope) {
    const found = element("th", text);
    found.scope = scope;
    return found;
  }

  function option(value, name) {
    const found = element("option", name);
    found.value = value;
    return found;
  }

  function choice(name, options, use) {
    const label = element("label", `${name} `, "chooser");
    const select = element("select");
    select.append(...options.map(([value, text]) => option(value, text)));
    select.addEventListener("change", () => use(select.value));
    label.append(select);
    return select;
  }
})();
