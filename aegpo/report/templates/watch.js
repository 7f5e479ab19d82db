"use strict";

const every = 2000; // milliseconds between looks
const main = document.querySelector("main");
const chosen = { at: null, seed: null }; // the step the reader chose, null: the newest; and the seed, null: the first

function shown(id, html) {
  const place = document.getElementById(id);
  if (place.dataset.html !== html) {
    place.dataset.html = html;
    place.innerHTML = html;
  }
}

function figures() {
  return [...document.querySelectorAll("#samples figure")];
}

function stepsOf(figure) {
  return figure.dataset.steps.split(" ").map(Number);
}

function showSamples() {
  const slider = document.getElementById("slider");
  if (slider === null) return;
  const steps = [...new Set(figures().flatMap(stepsOf))].sort((a, b) => a - b);
  const place = chosen.at === null ? steps.length - 1 : Math.max(0, steps.indexOf(chosen.at));
  slider.max = steps.length - 1;
  slider.value = place;
  document.getElementById("step").textContent = steps[place];
  const select = document.getElementById("seed");
  if (select !== null && chosen.seed !== null) select.value = chosen.seed;
  const seed = select === null ? null : select.value;
  for (const figure of figures()) {
    figure.hidden = seed !== null && figure.dataset.seed !== seed;
    const own = stepsOf(figure).filter((step) => step <= steps[place]);
    const step = own.length > 0 ? own[own.length - 1] : stepsOf(figure)[0];
    const source = `images/${encodeURIComponent(figure.dataset.arm)}/${figure.dataset.seed}/${step}`;
    const image = figure.querySelector("img");
    if (image.getAttribute("src") !== source) image.setAttribute("src", source);
    figure.querySelector(".at").textContent = step;
  }
  slider.oninput = () => {
    const at = Number(slider.value);
    chosen.at = at === steps.length - 1 ? null : steps[at]; // at the end it follows the newest
    showSamples();
  };
  if (select !== null) {
    select.onchange = () => {
      chosen.seed = select.value;
      showSamples();
    };
  }
}

async function look() {
  try {
    const answer = await fetch("progress", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const told = await answer.json();
    shown("progress", told.html);
    if (told.version !== main.dataset.version) {
      const results = await fetch("results", { cache: "no-store" });
      if (!results.ok) throw new Error(results.status);
      shown("results", await results.text());
      main.dataset.version = told.version;
      showSamples();
    }
    document.getElementById("lost").hidden = true;
  } catch {
    document.getElementById("lost").hidden = false;
  }
  setTimeout(look, every);
}

showSamples();
setTimeout(look, every);
