"use strict";
// The filters of the contact sheet. Without this script the page shows every bag, compared as it was written.
(() => {
  const $ = (id) => document.getElementById(id);
  const panel = $("filters");
  if (!panel) return;
  panel.hidden = false;
  const OUTCOMES = {
    "01": ["won", "▲"], "11": ["kept", "✓"], "10": ["regressed", "▼"], "00": ["lost", "✕"],
  };
  const bags = [...document.querySelectorAll(".bag")].map((element) => ({
    element,
    size: element.dataset.size,
    group: element.dataset.group,
    score: element.querySelector(".score"),
    cells: [...element.querySelectorAll(".cell")].map((cell) => ({
      cell,
      found: cell.dataset.found,
      mark: cell.querySelector(".mark"),
      text: `${element.dataset.bag} ${cell.dataset.image} ${[...cell.querySelectorAll("dd")].map((own) => own.textContent).join(" ")}`.toLowerCase(),
    })),
  }));
  const wanted = { outcome: "", size: "", group: "", text: "" };

  function compare() {
    const [from, to] = [Number($("from").value), Number($("to").value)];
    const counts = { won: 0, kept: 0, regressed: 0, lost: 0 };
    for (const bag of bags) {
      const sums = [0, 0];
      for (const own of bag.cells) {
        const pair = own.found[from] + own.found[to];
        const [name, sign] = OUTCOMES[pair] || ["unknown", "·"];
        own.outcome = name;
        own.cell.className = `cell ${name}`;
        own.mark.textContent = `${sign} ${name}`;
        if (name in counts) counts[name] += 1;
        sums[0] += own.found[from] === "1";
        sums[1] += own.found[to] === "1";
      }
      bag.score.textContent = `${sums[0]} → ${sums[1]} of ${bag.cells.length} found`;
    }
    for (const [name, count] of Object.entries(counts)) $(`count-${name}`).textContent = count;
  }

  function show() {
    let shown = 0;
    for (const bag of bags) {
      const fits = (!wanted.size || bag.size === wanted.size) && (!wanted.group || bag.group === wanted.group);
      let hits = 0;
      for (const own of bag.cells) {
        own.hit = fits && (!wanted.outcome || own.outcome === wanted.outcome) && own.text.includes(wanted.text);
        hits += own.hit;
        own.cell.classList.toggle("hit", own.hit && Boolean(wanted.outcome || wanted.text));
      }
      bag.element.hidden = !hits;
      shown += hits > 0;
    }
    $("shown").textContent = `${shown} of ${bags.length} bags`;
    $("none").hidden = shown > 0;
  }

  for (const button of panel.querySelectorAll("button[data-outcome]")) {
    button.addEventListener("click", () => {
      wanted.outcome = button.dataset.outcome;
      for (const other of panel.querySelectorAll("button[data-outcome]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      show();
    });
  }
  for (const name of ["size", "group"]) {
    $(name).addEventListener("change", (event) => { wanted[name] = event.target.value; show(); });
  }
  for (const name of ["from", "to"]) {
    $(name).addEventListener("change", () => { compare(); show(); });
  }
  // The image that was found instead, beside the caption that lost to it: a copy of its cell's, made when the bag comes near.
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      const images = [...target.querySelectorAll(".cell > img")];
      for (const place of target.querySelectorAll("dd.other[data-other]")) {
        const other = images[Number(place.dataset.other) - 1];
        const copy = new Image();
        copy.alt = "";
        copy.src = other.src;
        place.append(copy, `image ${place.dataset.other}, found instead`);
        place.hidden = false;
      }
    }
  }, { rootMargin: "50%" });
  for (const bag of bags) near.observe(bag.element);

  let timer = 0;
  $("search").addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => { wanted.text = event.target.value.trim().toLowerCase(); show(); }, 120);
  });
  // A browser keeps the choices of a form over a reload: read them.
  for (const name of ["size", "group"]) wanted[name] = $(name).value;
  wanted.text = $("search").value.trim().toLowerCase();
  compare();
  show();
})();
