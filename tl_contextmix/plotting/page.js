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
    for (const image of picture.querySelectorAll("img")) {
      image.addEventListener("pointermove", (event) => {
        const box = image.getBoundingClientRect();
        const place = (offset, size, count) =>
          Math.min(count - 1, Math.max(0, Math.floor((offset / size) * count)));
        const row = place(event.clientY - box.top, box.height, axes.rows.length);
        const column = place(event.clientX - box.left, box.width, axes.columns.length);
        image.nextElementSibling.textContent =
          `row ${axes.rows[row]} (${row}), column ${axes.columns[column]} (${column}): ` +
          cellValue(image, row, column, axes.largest);
      });
    }
  }

  // The colour is the number: white is zero, and one channel falls fastest on either side.
  function cellValue(image, row, column, largest) {
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
    if (red === 0xd0 && green === 0xd4 && blue === 0xd9) return "no number";
    const share = blue >= red ? (255 - red) / (255 - 0x21) : -(255 - green) / (255 - 0x18);
    return "about " + (share * largest).toPrecision(2);
  }
})();
