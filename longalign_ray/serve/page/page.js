// Asks a served model about a long document. What is written here stays in this page: nothing is stored.

const HELD_CHARS = 20_000; // a text field lays out all of its text at every key: 500,000 characters take half a second
const HEAD_CHARS = 3_000;
const TAIL_CHARS = 1_000;
const MAX_FILE_BYTES = 64 * 2 ** 20; // of a text file; the server has its own limit for what is sent
const TICK_MS = 100;

const byId = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const seconds = (ms) => `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;

let held = null; // {name, text, note}: a file, or a paste too long for the text field
let reading = 0; // number of the file that is being read
let isReading = false;
let running = null; // AbortController of the request under way
const turns = []; // {documentText, question, answer}, oldest first

// The document

function documentText() {
  const text = held ? held.text : byId("document").value;
  return text.trim() ? text : "";
}

function showDocument() {
  const text = held ? held.text : byId("document").value;
  byId("document").hidden = held !== null;
  byId("held").hidden = held === null;
  byId("remove").hidden = text === "";
  byId("document-size").textContent = text
    ? `${count(text.length)} characters${held?.note ? `; ${held.note}` : ""}`
    : "";
  if (!held) return;
  byId("held-name").textContent = held.name;
  const numLeftOut = text.length - HEAD_CHARS - TAIL_CHARS;
  if (numLeftOut <= 0) return byId("held-text").replaceChildren(text);
  const leftOut = element("span", "left-out", `${count(numLeftOut)} more characters, not shown here`);
  byId("held-text").replaceChildren(text.slice(0, HEAD_CHARS), leftOut, text.slice(-TAIL_CHARS));
}

function hold(name, text, note = "") {
  held = { name, text, note };
  byId("document").value = "";
  showDocument();
  byId("held-text").scrollTop = 0;
}

function removeDocument() {
  reading += 1;
  isReading = false;
  held = null;
  byId("document").value = "";
  showError("document-error", "");
  showDocument();
  byId("document").focus();
}

async function takeFiles(files) {
  if (files.length > 1) return showError("document-error", `${files.length} files: take one at a time`);
  const [file] = files;
  const mine = (reading += 1);
  isReading = true;
  showError("document-error", "");
  byId("document-size").textContent = `Reading ${file.name}…`;
  try {
    const { text, note } = await fileText(file);
    if (mine === reading) hold(file.name, text, note);
  } catch (error) {
    if (mine !== reading) return;
    showDocument();
    showError("document-error", `${file.name}: ${error.message}`);
  } finally {
    if (mine === reading) isReading = false;
  }
}

async function fileText(file) {
  if (file.type === "application/pdf" || /\.pdf$/i.test(file.name)) return pdfText(file);
  if (file.size > MAX_FILE_BYTES) {
    throw new Error(`${count(file.size)} bytes; a text file may have ${count(MAX_FILE_BYTES)}`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  const mark = bytes.length < 2 ? 0 : bytes[0] * 256 + bytes[1];
  const encoding = { 0xfffe: "utf-16le", 0xfeff: "utf-16be" }[mark] ?? "utf-8";
  let text;
  try {
    text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
  } catch {
    text = "\0";
  }
  if (text.includes("\0")) throw new Error("neither a PDF nor text in UTF-8; save it as txt, md or pdf");
  if (!text.trim()) throw new Error("has no text");
  return { text, note: "" };
}

async function pdfText(file) {
  const response = await send("page/text", { body: file, type: "application/pdf" });
  const { text, num_pages: numPages, num_empty_pages: numEmpty } = await response.json();
  const pages = numPages === 1 ? "1 page" : `${count(numPages)} pages`;
  return { text, note: numEmpty ? `${pages}, ${count(numEmpty)} of them without text, such as scans` : pages };
}

// The server

async function send(path, { body, type, signal } = {}) {
  const headers = new Headers();
  const key = byId("key").value.trim();
  if (type) headers.set("Content-Type", type);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`the server cannot be reached (${error.message})`);
  }
  if (response.ok) return response;
  if (response.status === 401) byId("key-label").hidden = false;
  const said = await response.text();
  throw new Error(errorMessage(said) ?? `status ${response.status}: ${said.slice(0, 500) || response.statusText}`);
}

function errorMessage(json) {
  try {
    return JSON.parse(json).error.message;
  } catch {
    return undefined;
  }
}

async function loadModels() {
  showError("model-error", "");
  try {
    const models = (await (await send("v1/models")).json()).data;
    const chosen = byId("model").value;
    byId("model").replaceChildren(...models.map((model) => new Option(model.id)));
    byId("model").value = models.some((model) => model.id === chosen) ? chosen : models.at(-1).id;
    const limits = new Map(models.map((model) => [model.id, model.max_model_len]));
    const showLimit = () => {
      const limit = limits.get(byId("model").value);
      byId("served").textContent = `Up to ${count(limit)} tokens, document and answer together`;
    };
    byId("model").onchange = showLimit;
    showLimit();
  } catch (error) {
    byId("served").textContent = "";
    showError("model-error", error.message);
    if (!byId("key-label").hidden) byId("key").focus();
  }
}

async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (unread + value).split(/\r?\n\r?\n/);
    unread = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

// Questions and answers

// The document comes first, so that all questions on it share the beginning of their prompts, which servers keep.
function messages(text, question) {
  const earlier = byId("keep").checked ? turns.filter((turn) => turn.documentText === text && turn.answer) : [];
  const asked = [...earlier, { question }].flatMap((turn) => [
    { role: "user", content: turn.question },
    ...(turn.answer ? [{ role: "assistant", content: turn.answer }] : []),
  ]);
  if (text) asked[0].content = `${text}\n\n${asked[0].content}`;
  return asked;
}

function requestBody(model, text, question) {
  const body = {
    model,
    messages: messages(text, question),
    temperature: byId("temperature").value === "" ? undefined : byId("temperature").valueAsNumber,
    max_tokens: byId("max-tokens").value === "" ? undefined : byId("max-tokens").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  return JSON.stringify(body);
}

async function ask() {
  if (running) return;
  const question = byId("question").value.trim();
  if (!question) return refuse("Write a question first.");
  if (isReading) return refuse("The document is still being read.");
  for (const id of ["max-tokens", "temperature"]) if (!byId(id).reportValidity()) return;
  running = new AbortController();
  if (!byId("model").value) await loadModels();
  if (!byId("model").value) return void (running = null);

  const text = documentText();
  const model = byId("model").value;
  const turn = { documentText: text, question, answer: "" };
  const shown = showTurn(question);
  byId("question").value = "";
  setRunning(true);
  say("Waiting for the first token.");
  const times = { start: performance.now() };
  const ticking = setInterval(() => {
    if (!times.first) shown.chips.replaceChildren(chip("waiting for the first token", seconds(since(times.start))));
  }, TICK_MS);
  let usage = null;
  let outcome = "";
  try {
    const body = requestBody(model, text, question);
    const response = await send("v1/chat/completions", { body, type: "application/json", signal: running.signal });
    let isWhole = false;
    for await (const data of serverEvents(response.body)) {
      if (data === "[DONE]") {
        isWhole = true;
        break;
      }
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        times.last = performance.now();
        if (choice.finish_reason === "length") outcome = "cut at the longest answer";
        if (!choice.delta.content) continue;
        if (!times.first) say("Answering.");
        times.first ??= times.last;
        turn.answer += choice.delta.content;
        shown.text.appendData(choice.delta.content); // as text, whatever the model writes
      }
    }
    if (!isWhole) throw new Error("the answer ended before the server said so; ask again");
    say("Answered.");
  } catch (error) {
    if (error.name === "AbortError") {
      outcome = `stopped after ${seconds(since(times.start))}`;
      say("Stopped.");
    } else {
      turn.answer = "";
      shown.article.append(alertOf(error.message));
      byId("question").value ||= question;
      say("");
    }
  }
  clearInterval(ticking);
  shown.chips.replaceChildren(...chips({ model, usage, times, outcome }));
  if (turn.answer) turns.push(turn);
  running = null;
  setRunning(false);
}

function chips({ model, usage, times, outcome }) {
  const made = [chip("model", model)];
  if (usage) {
    const numCached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    made.push(chip("prompt tokens", count(usage.prompt_tokens)));
    if (numCached) made.push(chip("of them cached", count(numCached)));
    made.push(chip("answer tokens", count(usage.completion_tokens)));
  }
  if (times.first) made.push(chip("first token after", seconds(times.first - times.start)));
  if (usage && times.last > times.first) { // the first token's time is the prompt's
    made.push(chip("tokens/s", ((1000 * (usage.completion_tokens - 1)) / (times.last - times.first)).toFixed(1)));
  }
  if (outcome) made.push(element("span", "chip", outcome));
  return made;
}

function showTurn(question) {
  const article = element("article", "turn");
  const text = document.createTextNode("");
  const answer = element("p", "answer");
  const line = element("p", "chips");
  answer.append(text);
  article.append(element("h3", "", question), answer, line);
  byId("turns").prepend(article);
  article.scrollIntoView({ block: "nearest" });
  return { article, text, chips: line };
}

// Parts

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

function chip(name, value) {
  const made = element("span", "chip", `${name} `);
  made.append(element("b", "", value));
  return made;
}

function alertOf(message) {
  const made = element("p", "error", message);
  made.setAttribute("role", "alert");
  return made;
}

function showError(id, message) {
  byId(id).textContent = message;
  byId(id).hidden = !message;
}

function refuse(message) {
  showError("model-error", message);
  byId("question").focus();
}

function setRunning(isRunning) {
  byId("ask").disabled = isRunning;
  byId("stop").disabled = !isRunning;
  byId("turns").setAttribute("aria-busy", isRunning); // read out when whole, not token by token
  if (isRunning) showError("model-error", "");
}

const say = (message) => (byId("state").textContent = message);
const since = (start) => performance.now() - start;
const stop = () => running?.abort();

// Events

byId("ask").onclick = ask;
byId("stop").onclick = () => {
  stop();
  byId("question").focus(); // the button is about to be disabled
};
byId("remove").onclick = removeDocument;
byId("choose").onclick = () => byId("file").click();
byId("file").onchange = () => {
  if (byId("file").files.length) takeFiles([...byId("file").files]);
  byId("file").value = ""; // the same file may be chosen again
};
byId("key").onchange = loadModels;
byId("document").oninput = () => showDocument();
byId("document").addEventListener("beforeinput", (event) => {
  const field = event.target;
  const added = event.data ?? event.dataTransfer?.getData("text/plain") ?? "";
  if (field.value.length + added.length <= HELD_CHARS) return;
  event.preventDefault();
  hold("Pasted text", field.value.slice(0, field.selectionStart) + added + field.value.slice(field.selectionEnd));
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  takeFiles([...event.clipboardData.files]);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  }
});
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!hasFiles(event)) return;
  event.preventDefault();
  takeFiles([...event.dataTransfer.files]);
});

showDocument(); // a reload may have kept the text
loadModels();
