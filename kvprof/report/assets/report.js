(() => {
  "use strict";
  const root = document.documentElement;

  // The scheme: as the system has it until the reader chooses.
  const button = document.createElement("button");
  button.id = "scheme";
  button.type = "button";
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.scheme ? root.dataset.scheme === "dark" : prefersDark.matches);
  const name = () => { button.textContent = isDark() ? "light page" : "dark page"; };
  button.addEventListener("click", () => { root.dataset.scheme = isDark() ? "light" : "dark"; name(); });
  prefersDark.addEventListener("change", name);
  name();
  document.querySelector("header").prepend(button);

  // What a mark says: at once, and under a finger too, where a browser's own hint is slow or missing.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const mark of document.querySelectorAll("svg .marks > *")) {
    const title = mark.querySelector(":scope > title");
    mark.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (event) => {
    const mark = event.target instanceof Element ? event.target.closest(".marks > *") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const above = event.clientY - box.height - 14;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 8 ? above : event.clientY + 18) + "px";
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // Tables, sorted by the heading that is pressed: numbers as numbers, what is no number last.
  const numeric = (text) => {
    const found = text.trim().match(/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      if (!heading.textContent.trim()) return;
      const press = document.createElement("button");
      press.type = "button";
      press.append(...heading.childNodes);
      heading.append(press);
      press.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        for (const other of headings) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => {
          const text = row.cells[column].textContent;
          return { row, text, number: heading.classList.contains("left") ? NaN : numeric(text) };
        });
        const sign = descending ? -1 : 1;
        rows.sort((a, b) => {
          if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return Number.isNaN(a.number) ? 1 : -1;
          return sign * (Number.isNaN(a.number) ? a.text.localeCompare(b.text) : a.number - b.number);
        });
        body.append(...rows.map((each) => each.row));
      });
    });
  }
})();
