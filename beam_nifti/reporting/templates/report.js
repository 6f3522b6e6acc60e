"use strict";
{
  const BATCH = 48;
  const { labels, volumes } = JSON.parse(document.getElementById("volumes").textContent);
  const wall = document.getElementById("wall");
  const template = document.getElementById("card");
  const more = document.getElementById("more");
  const controls = document.getElementById("controls");
  const text = new Intl.Collator("en", { numeric: true });
  let found = [];
  let shown = 0;

  const words = (volume) =>
    [volume.id, volume.participant, volume.split, ...volume.labels, volume.shape, volume.spacing, volume.orientation]
      .join(" ")
      .toLowerCase();
  volumes.forEach((volume, order) => Object.assign(volume, { order, words: words(volume) }));

  const number = (value) =>
    Math.abs(value) >= 1000 && Math.abs(value) < 1e6
      ? value.toLocaleString("en", { maximumFractionDigits: 0 })
      : value
        ? value.toPrecision(3)
        : "0";

  const keys = {
    score: (volume) => -volume.score,
    order: (volume) => volume.order,
    id: (volume) => volume.id,
  };

  const compare = (by) => {
    const [name, direction] = by.split("|");
    const key =
      keys[name] ?? (name in labels ? (volume) => volume.labels[name] ?? "" : (volume) => volume.numbers[name]);
    const sign = direction === "down" ? -1 : 1;
    return (a, b) => {
      const [left, right] = [key(a), key(b)];
      const difference = typeof left === "string" ? text.compare(left, right) : left - right;
      return sign * difference || a.order - b.order;
    };
  };

  const draw = (volume) => {
    const card = template.content.cloneNode(true);
    const set = (name, value) => (card.querySelector(`[data-${name}]`).textContent = value);
    const image = card.querySelector("img");
    image.src = `data:image/webp;base64,${volume.picture}`;
    image.alt = `Middle slices of ${volume.id}`;
    const overlay = card.querySelector(".overlay");
    if (volume.overlay) overlay.src = `data:image/webp;base64,${volume.overlay}`;
    else overlay.remove();
    set("id", volume.id);
    set("facts", [volume.split, ...volume.labels.map((label, place) => `${labels[place]} ${label ?? "none"}`)].join(" · "));
    set("space", `${volume.shape} · ${volume.spacing} mm · ${volume.orientation}`);
    const numbers = card.querySelector("[data-numbers]");
    for (const [name, value] of Object.entries(volume.numbers)) {
      const term = document.createElement("dt");
      const definition = document.createElement("dd");
      term.textContent = name;
      definition.textContent = number(value);
      numbers.append(term, definition);
    }
    const reasons = card.querySelector("[data-reasons]");
    for (const reason of volume.reasons) {
      const item = document.createElement("li");
      item.textContent = reason;
      reasons.append(item);
    }
    if (!volume.reasons.length) reasons.remove();
    return card;
  };

  const extend = () => {
    // Each time as many again, so that thousands are a few clicks away.
    const next = found.slice(shown, shown + Math.max(BATCH, shown));
    wall.append(...next.map(draw));
    shown += next.length;
    more.hidden = shown >= found.length;
  };

  const select = () => {
    const wanted = controls.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const split = controls.elements.split.value;
    found = volumes
      .filter((volume) => !split || volume.split === split)
      .filter((volume) => !controls.elements.outliers.checked || volume.reasons.length)
      .filter((volume) => wanted.every((word) => volume.words.includes(word)))
      .sort(compare(controls.elements.sort.value));
    document.getElementById("count").textContent =
      `${found.length.toLocaleString("en")} of ${volumes.length.toLocaleString("en")} pictures`;
    wall.replaceChildren();
    shown = 0;
    extend();
  };

  controls.addEventListener("input", select);
  controls.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const first = shown;
    extend();
    wall.children[first]?.focus();
  });
  controls.hidden = false;
  select();
}
