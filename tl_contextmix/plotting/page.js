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
