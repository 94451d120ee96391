// The form: asks, says how far it is, stops, and shows the answer in a frame of no origin.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const form = document.querySelector("form");
  const boxes = [...document.querySelectorAll("[name=show]")];
  const [ask, stop, save, frame] = [form.querySelector("[type=submit]"), at("stop"), at("save"), at("answer")];
  let call = null;
  // Which layer and token the answer shows, as its own address has them.
  let place = "";

  // ---- the question, in the form and after the # of the address, which no server sees

  function question() {
    const found = { text: at("text").value, show: boxes.filter((box) => box.checked).map((box) => box.value) };
    for (const name of ["target", "foil"]) if (at(name).value) found[name] = at(name).value;
    for (const name of ["pos", "generate"]) if (at(name).value) found[name] = at(name).valueAsNumber;
    return found;
  }

  function writeAddress() {
    const parts = new URLSearchParams();
    for (const [name, value] of Object.entries(question())) parts.set(name, value);
    if (place) parts.set("place", place);
    history.replaceState(null, "", `#${parts}`);
  }

  function readAddress() {
    const parts = new URLSearchParams(location.hash.slice(1));
    // What another address asked is not asked by this one.
    if (parts.has("text"))
      for (const name of ["text", "target", "foil", "pos", "generate"]) at(name).value = parts.get(name) ?? "";
    for (const details of document.querySelectorAll("details"))
      details.open ||= [...details.querySelectorAll("input")].some((one) => parts.has(one.id));
    if (parts.has("show")) {
      const shown = parts.get("show").split(",");
      for (const box of boxes) box.checked = shown.includes(box.value);
      at("methods").open = at("methods").querySelector(":checked") !== null;
    }
    place = parts.get("place") ?? "";
    return parts.has("text");
  }

  // ---- asking

  async function send(path, body) {
    const headers = { "content-type": "application/json" };
    const keepalive = body === undefined; // of a window that closes, too
    return fetch(path, { method: "POST", headers, keepalive, body: body && JSON.stringify(body) });
  }

  async function explain() {
    if (call) return;
    busy("sent");
    writeAddress();
    tell("Sent.");
    refuse("");
    try {
      const answer = await send("calls", question());
      const told = await answer.json();
      if (answer.ok) await follow(told.name);
      else {
        tell(answer.status === 409 ? "Busy." : "Not asked.");
        refuse(told.message);
      }
    } catch {
      tell("No answer.");
      refuse("The program that answers is gone. Start it again, and open the address that it prints.");
    }
    busy(null);
  }

  async function follow(name) {
    busy(name);
    for (let wait = 100; ; wait = Math.min(1000, wait * 1.3)) {
      const told = await (await fetch(`calls/${name}`)).json();
      progress(told);
      if (told.state !== "running") return finish(name, told);
      await new Promise((done) => setTimeout(done, wait));
    }
  }

  function progress({ step, done, steps }) {
    at("progress").max = steps;
    at("progress").value = done;
    tell(`Step ${Math.min(done + 1, steps)} of ${steps}: ${step}.`);
  }

  function finish(name, { state, message, seconds, likely }) {
    const words = { done: "Done", refused: "Not answered", stopped: "Stopped", failed: "Failed" };
    tell(`${words[state]} after ${seconds} s.`);
    refuse(message);
    if (state !== "done") return;
    const address = `calls/${name}/page`;
    // Not by its src: going back must not bring the answer to another question.
    frame.contentWindow.location.replace(new URL(place ? `${address}#${place}` : address, location));
    save.href = address;
    frame.hidden = save.hidden = false;
    at("waiting").hidden = true;
    // Below the form, where there is no room beside it.
    if (matchMedia("(max-width: 899px)").matches) frame.scrollIntoView();
    at("likely").replaceChildren(
      ...likely.map((token) => {
        const option = document.createElement("option");
        option.value = token;
        return option;
      }),
    );
  }

  // ---- what is to be seen of it

  function busy(name) {
    call = name;
    ask.disabled = name !== null;
    stop.disabled = name === null || name === "sent";
    at("progress").hidden = name === null;
    form.setAttribute("aria-busy", name !== null);
  }

  // Spoken only where something changes.
  function tell(text) {
    if (at("status").textContent !== text) at("status").textContent = text;
  }

  function refuse(text) {
    at("explanation").textContent = text;
    at("explanation").hidden = !text;
  }

  at("generate").addEventListener("input", () => {
    form.querySelector("[value=answer]").checked = true;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    place = "";
    explain();
  });
  at("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
  stop.addEventListener("click", () => {
    stop.disabled = true;
    tell("Stopping.");
    send(`calls/${call}/stop`).catch(() => {});
  });
  // Nobody waits for the answer to a window that was closed.
  addEventListener("pagehide", () => {
    if (call && call !== "sent") send(`calls/${call}/stop`).catch(() => {});
  });
  addEventListener("message", ({ data, source }) => {
    if (source !== frame.contentWindow || data?.tl_contextmix !== "place") return;
    place = String(data.place).slice(0, 200);
    writeAddress();
  });
  addEventListener("hashchange", () => readAddress() && explain());
  if (readAddress()) explain();
})();
