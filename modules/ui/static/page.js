// The page's own script: the task id of this tab, shortcuts, pasted parameters, "Generate forever", reconnecting.
(() => {
  "use strict";
  const address = new URL(location.href);
  if (window.focaleTheme && !address.searchParams.has("__theme")) {
    address.searchParams.set("__theme", window.focaleTheme);
    history.replaceState(null, "", address);
  }

  const TASK = "focale_task";
  const byId = (id) => document.getElementById(id);
  const isShown = (element) => !!element && element.offsetParent !== null;
  const promptBox = () => document.querySelector("#positive_prompt textarea");

  // -- the task this tab shows; the tab's own storage survives a reload ------------------------------------------
  window.focale = {
    rememberTask(id) {
      if (id) sessionStorage.setItem(TASK, id);
    },
    recallTask: () => sessionStorage.getItem(TASK) || "",
  };

  // -- shortcuts -------------------------------------------------------------------------------------------------
  const WORD_END = " \n\t.,\\/!?%^*;:{}=`~()";

  function pressRun() {
    const generate = byId("generate_button");
    const target = isShown(generate) ? generate : byId("stop_button");
    if (isShown(target) && !target.disabled) target.click();
  }

  /** The part of the text a weight applies to: the selection, else the bracket or word around the cursor. */
  function target(text, from, to) {
    if (from !== to) return [from, to];
    for (const [open, close] of ["()", "<>"]) {
      const start = text.lastIndexOf(open, from - 1);
      const end = text.indexOf(close, from);
      const isInside = start >= 0 && end >= 0 && text.lastIndexOf(close, from - 1) < start;
      if (isInside && /:[-+.\d]+$/.test(text.slice(start, end))) return [start, end + 1];
    }
    let start = from;
    let end = to;
    while (start > 0 && !WORD_END.includes(text[start - 1])) start--;
    while (end < text.length && !WORD_END.includes(text[end])) end++;
    return [start, end];
  }

  function weighted(part, direction) {
    const bracket = /^([(<])([\s\S]*):([-+.\d]+)([)>])$/.exec(part);
    const isTag = bracket && bracket[1] === "<";
    const old = bracket ? parseFloat(bracket[3]) : 1;
    const weight = Math.round((old + direction * (isTag ? 0.05 : 0.1)) * 100) / 100;
    const words = bracket ? bracket[2] : part;
    if (isTag) return `<${words}:${weight}>`;
    return weight === 1 ? words : `(${words}:${weight})`;
  }

  function changeWeight(box, direction) {
    const [from, to] = target(box.value, box.selectionStart, box.selectionEnd);
    if (from === to) return;
    const part = weighted(box.value.slice(from, to), direction);
    box.setRangeText(part, from, to, "select");
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  document.addEventListener("keydown", (event) => {
    const command = event.ctrlKey || event.metaKey;
    if (event.key === "Enter" && (command || event.altKey)) {
      event.preventDefault();
      pressRun();
      return;
    }
    const box = event.target;
    const isArrow = event.key === "ArrowUp" || event.key === "ArrowDown";
    if (command && isArrow && box.tagName === "TEXTAREA" && box.closest('[id*="_prompt"]')) {
      event.preventDefault();
      changeWeight(box, event.key === "ArrowUp" ? 1 : -1);
    }
  });

  // -- pasted parameters: "Load Parameters" takes the place of "Generate" -------------------------------------------
  function isParameters(text) {
    if (!text.trim().startsWith("{")) return false;
    try {
      return typeof JSON.parse(text) === "object";
    } catch {
      return false;
    }
  }

  function noteParameters() {
    const box = promptBox();
    if (box) document.body.classList.toggle("has-parameters", isParameters(box.value));
  }

  document.addEventListener("input", (event) => {
    if (event.target === promptBox()) noteParameters();
  });

  // -- generate forever: until stopped, over a reload and a restart of the server too ---------------------------------
  const FOREVER = "focale_forever";
  let forever = null;

  function endForever() {
    clearInterval(forever);
    forever = null;
    sessionStorage.removeItem(FOREVER);
    document.body.classList.remove("is-forever");
  }

  function beginForever() {
    endForever();
    sessionStorage.setItem(FOREVER, "1");
    document.body.classList.add("is-forever");
    const again = () => {
      if (isShown(byId("generate_button"))) byId("generate_button").click();
    };
    again();
    forever = setInterval(again, 500);
  }

  function goOnForever() {
    if (sessionStorage.getItem(FOREVER)) beginForever();
  }

  // Gradio adds this script once its own has run: before the page's "load" event, or after it.
  if (document.readyState === "complete") goOnForever();
  else addEventListener("load", goOnForever);

  function closeMenu() {
    document.querySelectorAll(".focale-menu").forEach((menu) => menu.remove());
  }

  function openMenu(x, y) {
    closeMenu();
    const menu = document.createElement("div");
    menu.className = "focale-menu";
    menu.setAttribute("role", "menu");
    const entry = document.createElement("button");
    entry.textContent = forever ? "Cancel generate forever" : "Generate forever";
    entry.setAttribute("role", "menuitem");
    entry.onclick = forever ? endForever : beginForever;
    menu.append(entry);
    document.body.append(menu);
    menu.style.left = `${Math.min(x, innerWidth - menu.offsetWidth - 8)}px`;
    menu.style.top = `${Math.min(y, innerHeight - menu.offsetHeight - 8)}px`;
  }

  document.addEventListener("contextmenu", (event) => {
    if (!event.target.closest?.("#generate_button, #stop_button")) return;
    event.preventDefault();
    openMenu(event.clientX, event.clientY);
  });
  document.addEventListener("click", (event) => {
    closeMenu();
    if (event.target.closest?.("#stop_button, #reset_button")) endForever();
    if (event.target.closest?.("#reset_button")) location.reload();
  });

  // -- a server that goes away and comes back --------------------------------------------------------------------
  // Gradio notices a stream that breaks, but not one that a server ends in good order because it stops. A stream whose
  // events are all through says so before it ends. When one has ended without that and a run still seems to be in work,
  // wait for the server and load the page anew: it goes on where it was.
  const RETRY_MS = 2000;
  const ALL_THROUGH = '"close_stream"';
  let isLeaving = false;
  let openStreams = 0;

  const isBusy = () => !!document.querySelector(".focale-bar");

  async function comeBack() {
    while (!isLeaving && !openStreams && isBusy()) {
      const answer = await fetch("favicon.ico", { cache: "no-store" }).catch(() => null);
      if (answer?.ok) return location.reload();
      document.body.classList.add("is-lost");
      await new Promise((done) => setTimeout(done, RETRY_MS));
    }
  }

  async function watchStream(stream) {
    openStreams++;
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let end = ""; // what was said last, long enough to hold the word that is looked for
    try {
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        end = (end + part.value).slice(-4 * ALL_THROUGH.length);
      }
    } catch {
      // a stream that broke has ended, too
    }
    openStreams--;
    if (!end.includes(ALL_THROUGH)) setTimeout(comeBack, RETRY_MS / 2); // its last words are on the page by then
  }

  const plainFetch = window.fetch;
  window.fetch = async (...call) => {
    const answer = await plainFetch(...call);
    const url = String(call[0]?.url ?? call[0]);
    if (url.includes("/queue/data") && answer.ok && answer.body) watchStream(answer.clone().body);
    return answer;
  };

  // -- the prompt survives a reload of this tab ----------------------------------------------------------------------
  const PROMPT = "focale_prompt";
  addEventListener("pagehide", () => {
    isLeaving = true;
    if (promptBox()) sessionStorage.setItem(PROMPT, promptBox().value);
  });

  function restorePrompt() {
    const box = promptBox();
    if (!box) return;
    const kept = sessionStorage.getItem(PROMPT);
    sessionStorage.removeItem(PROMPT);
    if (!kept || box.value) return;
    box.value = kept;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  // -- what Gradio changes: the prompt, when the page is drawn or the server sets it --------------------------------
  new MutationObserver(() => {
    noteParameters();
    restorePrompt();
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
