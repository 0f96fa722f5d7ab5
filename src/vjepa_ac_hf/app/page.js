// `element`, `server` and `upload` are Gradio's. Texts go into the page as text, never as HTML.
const $ = (id) => element.querySelector("#vx-" + id);
const KEYS = {w: "key.w", a: "key.a", s: "key.s", d: "key.d", " ": "key.space", Shift: "key.left.shift",
              Control: "key.left.control", q: "key.q", f: "key.f"};
const LOOKS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const held = new Set(), looking = new Set(), log = {timings: []};
let token = sessionStorage.getItem("vjepa-token") || "", about = {}, story = null, acting = false, planning = false, next = null;
window.vjepa = log;  // for tests: what has been measured

async function ask(name, request = {}) {
  // Gradio says failures on the console, and answers undefined.
  const answer = await server[name]({token, ...request}).catch(() => undefined);
  lost(!answer);
  if (!answer) return null;
  if (answer.error) {
    say(answer.error);
    if (answer.ended) ended(answer.error);
    return null;
  }
  return answer;
}
function lost(is) {
  if (is) $("lost").textContent = "No answer: the program that shows this page has ended, or the connection is lost. " +
    "What is shown stays; it goes on when the program answers again.";
  else if ($("lost").dataset.kind !== "ended") $("lost").textContent = "";
  if (is) $("lost").dataset.kind = "lost";
  $("lost").hidden = !$("lost").textContent;
}
function ended(why) {
  token = ""; story = null; planning = false;
  sessionStorage.removeItem("vjepa-token");
  $("lost").dataset.kind = "ended";
  $("lost").textContent = why + ". Choose a clip to begin another one.";
  $("lost").hidden = false;
}
const say = (text) => { $("status").textContent = text; };
const number = (id) => Number($(id).value);

// ---------------------------------------------------------------------------------------------- what is shown
function cell(source, text, kind = "", real = null) {
  const box = document.createElement("div"), words = document.createElement("p");
  box.className = "vx-cell " + kind;
  words.textContent = text;
  for (const [picture, of] of [[source, kind], [real, "vx-true"]]) {
    if (!picture) continue;
    const image = document.createElement("img");
    image.src = picture; image.alt = text; image.className = of;
    box.append(image);
  }
  box.append(words);
  return box;
}
const imagined = (step) =>
  cell(step.picture, "+" + step.seconds.toFixed(1) + " s\n" + step.action.join("\n"), "", step.real);
function show(found) {
  story = found; planning = false;
  $("lost").hidden = true; delete $("lost").dataset.kind;
  $("note").textContent = found.name + (found.note ? ": " + found.note : "");
  $("recorded").disabled = !found.logged;
  $("strip").replaceChildren(...found.frames.slice(0, found.context).map((f, i) =>
    cell(f, i ? "seen" + (found.actions[i - 1] ? "\n" + found.actions[i - 1].join("\n") : "") : "seen", "vx-true")));
  $("goals").replaceChildren(...found.frames.map((f, i) => {
    const box = cell(f, (i * about.seconds).toFixed(1) + " s", "vx-goal");
    box.addEventListener("click", () => look_for(i, box));
    return box;
  }));
  found.steps.forEach((step) => $("strip").append(imagined(step)));
  lanes(found.lanes);
  now();
}
function lanes(found) {
  story.lanes = found;
  $("lanes").replaceChildren(...found.map((lane) => {
    const box = document.createElement("div"), title = document.createElement("h3"), strip = document.createElement("div");
    title.textContent = lane.title; strip.className = "vx-strip";
    strip.append(...lane.steps.map(imagined));
    box.append(title, strip);
    return box;
  }));
}
function now() {
  const step = story.steps[story.steps.length - 1];
  $("now").src = step ? step.picture : story.frames[story.context - 1];
  $("now-caption").textContent = step ? (about.decoded ? "imagined" : "imagined: the nearest real frame") + ", " +
    step.seconds.toFixed(1) + " s ahead; view " + step.view[0].toFixed(0) + "°, " + step.view[1].toFixed(0) + "°"
    : "the last frame of the context: act";
  const real = step ? step.real : story.frames[story.context - 1];
  $("real-box").style.visibility = real ? "visible" : "hidden";
  if (real) $("real").src = real;
  $("real-caption").textContent = step && step.real ? "what really happened; error of the features " +
    step.error.toFixed(3) + ", of standing still " + step.still.toFixed(3) : step ? "" : "what really happened";
  $("sure").textContent = step ? step.sure : "";
}
async function add(step) {
  story.steps.push(step);
  $("strip").append(imagined(step));
  now();
  await $("now").decode().catch(() => {});
  $("strip").scrollLeft = $("strip").scrollWidth;
}

// ---------------------------------------------------------------------------------------------- acting
async function act(request, pressed = performance.now()) {
  if (!story) return;
  planning = false;
  next = {request, pressed};  // of what is pressed while a step is imagined, the last counts
  if (acting) return;
  acting = true;
  while (next) {
    const {request, pressed} = next;
    next = null;
    const answer = await ask("act", request);
    if (!answer) break;
    say("");
    await add(answer.step);
    requestAnimationFrame(() => log.timings.push(performance.now() - pressed));
  }
  next = null;
  acting = false;
}
function step(pressed) {
  const turn = number("degrees") || 15;
  let yaw = 0, pitch = 0;
  for (const key of looking) { yaw += LOOKS[key][0] * turn; pitch += LOOKS[key][1] * turn; }
  act({held: [...held], yaw, pitch}, pressed);
}
function down(event) {
  if (!element.isConnected || event.altKey || event.metaKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
  if (event.repeat && acting) return event.preventDefault();
  const pressed = performance.now(), key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  planning = false;
  if (key in LOOKS) { looking.add(key); step(pressed); }
  else if (/^[1-9]$/.test(key)) act({held: [...held, "key." + key]}, pressed);
  else if (key in KEYS) {
    held.add(KEYS[key]);
    mark();
    if (key !== "Shift" && key !== "Control") step(pressed);
  }
  else if (key === "n") act({held: [...held]}, pressed);
  else if (key === "Enter") act({recorded: true}, pressed);
  else if (key === "Backspace") undo();
  else return;
  event.preventDefault();
}
function up(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  looking.delete(key);
  if (key in KEYS) held.delete(KEYS[key]);
  mark();
}
const mark = () => element.querySelectorAll("[data-key]").forEach((b) =>
  b.classList.toggle("vx-held", held.has(b.dataset.key)));
async function undo() {
  planning = false;
  const answer = story && await ask("undo");
  if (!answer) return;
  story.steps.length = answer.steps;
  while ($("strip").children.length > story.context + answer.steps) $("strip").lastChild.remove();
  now();
}
function drag() {
  let from = null;
  $("now").addEventListener("pointerdown", (e) => { from = [e.clientX, e.clientY]; $("now").setPointerCapture(e.pointerId); });
  $("now").addEventListener("pointerup", (e) => {
    if (!from) return;
    const dx = e.clientX - from[0], dy = e.clientY - from[1];
    from = null;
    const button = e.button === 2 ? "mouse.right" : e.button === 1 ? "mouse.middle" : "mouse.left";
    // As the mouse in the game: 0.15 degrees a pixel.
    if (Math.abs(dx) + Math.abs(dy) < 5) act({held: [...held, button]});
    else act({held: [...held], yaw: Math.max(-179, Math.min(179, dx * 0.15)), pitch: Math.max(-90, Math.min(90, dy * 0.15))});
  });
  $("now").addEventListener("contextmenu", (e) => e.preventDefault());
}
async function look_for(goal, box) {
  if (!story || planning) return;
  element.querySelectorAll(".vx-chosen").forEach((b) => b.classList.remove("vx-chosen"));
  box.classList.add("vx-chosen");
  planning = true;
  say("the planner looks for a way ...");
  while (planning) {
    const answer = await ask("plan", {goal});
    if (!answer) break;
    if (answer.done) { say(answer.message); break; }
    await add(answer.step);
    say("distance to the goal " + answer.distance.toFixed(3) + " now, " + answer.before.toFixed(3) + " a step before, " +
        answer.start.toFixed(3) + " at the start; the plan expects " + answer.expected.toFixed(3) +
        (answer.left ? " after " + answer.left + " more" : " here"));
  }
  planning = false;
}

// ---------------------------------------------------------------------------------------------- beginning, saving
async function begin(request, name) {
  held.clear(); looking.clear(); mark();
  say("opening ...");
  const answer = await ask(name, {context: number("context"), ...request});
  if (!answer) return;
  token = answer.token;
  sessionStorage.setItem("vjepa-token", token);
  say("");
  show(answer.story);
}
async function drop(files) {
  const found = {video: null, log: null};
  for (const file of files) found[/\.jsonl$/i.test(file.name) ? "log" : "video"] = file;
  if (!found.video) return say("a video is needed: an mp4 file, with or without its .jsonl log");
  if (!about.upload_bytes) return say("this page takes no videos");
  const request = {name: found.video.name, second: number("second")};
  for (const [kind, most] of [["video", about.upload_bytes], ["log", about.log_bytes]]) {
    if (!found[kind]) continue;
    if (found[kind].size > most)
      return say(found[kind].name + " is too large: at most " + Math.round(most / 2 ** 20) + " MB, found " +
                 Math.round(found[kind].size / 2 ** 20) + " MB; cut it");
    say("sending " + found[kind].name + " ...");
    try {
      request[kind] = (await upload(found[kind])).path;
    } catch (error) {
      return say(found[kind].name + " could not be sent: " + error.message);
    }
  }
  await begin(request, "drop");
}
async function save(name, request) {
  const answer = story && await ask(name, request);
  if (!answer) return;
  const bytes = Uint8Array.from(atob(answer.data), (c) => c.charCodeAt(0)), link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], {type: answer.type}));
  link.download = answer.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
async function start() {
  for (let i = 1; i <= 9; i++) {
    const button = document.createElement("button");
    button.textContent = "slot " + i;
    button.addEventListener("click", () => act({held: [...held, "key." + i]}));
    $("slots").append(button);
  }
  element.querySelectorAll("[data-key]").forEach((b) => b.addEventListener("click", () => act({held: [...held, b.dataset.key]})));
  element.querySelectorAll("[data-look]").forEach((b) => b.addEventListener("click", () => {
    const [x, y] = b.dataset.look.split(",").map(Number), turn = number("degrees") || 15;
    act({held: [...held], yaw: x * turn, pitch: y * turn});
  }));
  element.querySelectorAll("button").forEach((b) => b.addEventListener("click", () => b.blur()));  // keys are the game's
  const on = (id, does) => $(id).addEventListener("click", does);
  on("none", () => act({held: [...held]}));
  on("recorded", () => act({recorded: true}));
  on("undo", undo);
  const again = async (aside) => { const a = story && await ask("restart", {aside}); if (a) { say(""); show(a.story); } };
  on("restart", () => again(false));
  on("aside", () => again(true));
  for (const name of ["mirror", "clear"])
    on(name, async () => { const answer = story && await ask(name); if (answer) lanes(answer.lanes); });
  on("webp", () => save("film", {format: "webp"}));
  on("mp4", () => save("film", {format: "mp4"}));
  on("log", () => save("log"));
  $("clip").addEventListener("change", () => { $("clip").blur(); begin({clip: $("clip").selectedIndex}, "choose"); });
  $("context").addEventListener("change", () => begin({clip: $("clip").selectedIndex}, "choose"));
  $("files").addEventListener("change", () => { drop([...$("files").files]); $("files").value = ""; });
  for (const kind of ["dragover", "dragleave", "drop"]) element.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("vx-over", kind === "dragover");
    if (kind === "drop") drop([...event.dataTransfer.files]);
  });
  document.addEventListener("keydown", down);
  document.addEventListener("keyup", up);
  window.addEventListener("blur", () => { held.clear(); looking.clear(); mark(); });
  drag();
  about = await ask("hello") || about;
  if (!about.clips) return;
  $("clip").replaceChildren(...about.clips.map((name) => Object.assign(document.createElement("option"), {textContent: name})));
  $("seconds").textContent = about.seconds.toFixed(1);
  $("context").max = about.steps - 1;
  $("drop").hidden = !about.upload_bytes;
  if (about.story) show(about.story);
  else await begin({clip: 0}, "choose");
  if (about.ended) say("the story of before has ended; this is a new one");
  setInterval(async () => {
    const answer = await ask("alive");
    if (answer && token && !answer.known) ended("This story has ended: nothing was done for long, or the program was started anew");
  }, 3000);
  log.ready = true;
}
start();
