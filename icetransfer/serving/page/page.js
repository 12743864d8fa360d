// The page of python -m icetransfer.serve: what is heard, what the models say, and how late.

const LONGEST_FILE = 200e6; // bytes
const NARROW = 700; // pixels
const SILENT_SECONDS = 3; // after which a microphone that gives only zeros is mentioned

const GONE = "The server has ended: start python -m icetransfer.serve again and reload this page.";

const LISTENING = "Listening: speak now.";
const MUTED = "The microphone gives nothing but zeros: is it muted, or is another one chosen in the browser?";

const $ = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(text, isBad = false) {
  $("message").textContent = text;
  $("message").className = isBad ? "bad" : "";
}

// ---- one model's words ----

class Word {
  // shown: milliseconds from the word's end in the audio to now.
  constructor(text, shown) {
    this.text = this.first = text;
    this.shown = this.firstShown = shown;
    this.isGone = false;
    this.textNode = element("span", { textContent: text });
    this.delayNode = element("small");
    this.node = element("span", { className: "word" }, this.textNode, this.delayNode);
    this.draw();
  }

  get isChanged() {
    return this.text !== this.first;
  }

  update(text, shown) {
    if (text === this.text && !this.isGone) return;
    if (text !== this.text) [this.text, this.shown] = [text, shown];
    this.isGone = false;
    this.draw();
  }

  takeBack() {
    this.isGone = true;
    this.draw();
  }

  draw() {
    this.textNode.textContent = this.text;
    this.delayNode.textContent = Math.round(this.shown);
    this.node.classList.toggle("changed", this.isChanged);
    this.node.classList.toggle("gone", this.isGone);
    const first = `“${this.first}” after ${Math.round(this.firstShown)} ms`;
    this.node.title = this.isChanged ? `first ${first}` : first;
  }
}

export class Column {
  constructor(about) {
    this.about = about;
    this.text = element("div", { className: "text" });
    this.figures = {};
    const list = element("dl");
    const names = { median: "Delay, median", high: "Delay, 95 %", words: "Words, changed", cpu: "CPU" };
    for (const [key, name] of Object.entries(names)) {
      this.figures[key] = element("dd", { textContent: "–" });
      list.append(element("dt", { textContent: name }), this.figures[key]);
    }
    const { bundle, precision, megabytes } = about;
    this.node = element(
      "section",
      { className: "column" },
      element("h2", { textContent: bundle }),
      element("p", { textContent: `${tierName(about)} · ${precision} · ${megabytes} MB` }),
      this.text,
      list,
    );
    this.node.dataset.id = about.id;
    this.clear();
  }

  clear() {
    this.text.replaceChildren();
    this.words = []; // all that were shown
    this.current = []; // of the segment that has not ended
    this.line = null;
    for (const figure of Object.values(this.figures)) figure.textContent = "–";
  }

  // begin: when the audio began, in milliseconds of performance.now(); sent: its seconds so far.
  hear({ ended, partial, seconds, cpu }, begin, sent) {
    for (const words of ended) {
      this.show(words, begin, sent);
      this.endSegment();
    }
    this.show(partial, begin, sent);
    this.draw(seconds, cpu);
  }

  show(words, begin, sent) {
    const now = performance.now();
    if (words.length && !this.line) {
      this.line = element("p", { className: "partial" });
      this.text.append(this.line);
    }
    words.forEach(([text, , end], i) => {
      // A last token may come out in the silence that the server puts behind the end.
      const shown = now - (begin + 1000 * Math.min(end, sent));
      if (i < this.current.length) {
        this.current[i].update(text, shown);
      } else {
        const word = new Word(text, shown);
        this.current.push(word);
        this.words.push(word);
        this.line.append(word.node);
      }
    });
    for (const word of this.current.slice(words.length)) if (!word.isGone) word.takeBack();
  }

  endSegment() {
    if (this.line) this.line.className = "";
    [this.current, this.line] = [[], null];
  }

  draw(seconds, cpu) {
    const delays = this.words.filter((word) => !word.isGone).map((word) => word.shown);
    delays.sort((a, b) => a - b);
    const at = (share) => Math.round(delays[Math.ceil(share * delays.length) - 1]);
    if (delays.length) {
      this.figures.median.textContent = `${at(0.5)} ms`;
      this.figures.high.textContent = `${at(0.95)} ms`;
    }
    const changed = this.words.filter((word) => word.isChanged || word.isGone).length;
    this.figures.words.textContent = `${delays.length}, ${changed}`;
    if (seconds) this.figures.cpu.textContent = `${((100 * cpu) / seconds).toFixed(1)} %`;
    this.text.scrollTop = this.text.scrollHeight;
  }
}

function tierName({ tier, chunk_ms, look_ahead_ms }) {
  return tier === "offline" ? "offline, words at the end" : `${chunk_ms} ms + ${look_ahead_ms} ms`;
}

// ---- which columns stand there ----

const about = { columns: [], recordings: [] };
const columns = new Map(); // by id, those that are chosen

function boxes() {
  return [...document.querySelectorAll("#choice input")];
}

function choose(isWanted) {
  for (const box of boxes()) box.checked = isWanted(about.columns.find((c) => c.id === box.value));
  arrange();
}

function arrange() {
  const wanted = boxes().filter((box) => box.checked).map((box) => box.value);
  for (const id of [...columns.keys()]) if (!wanted.includes(id)) columns.delete(id);
  const inOrder = wanted.map((id) => columns.get(id) ?? new Column(about.columns.find((c) => c.id === id)));
  columns.clear();
  for (const column of inOrder) columns.set(column.about.id, column);
  $("columns").replaceChildren(...inOrder.map((column) => column.node));
  $("chosen").textContent = `${wanted.length} of ${about.columns.length}`;
}

function drawChoice() {
  const precisions = [...new Set(about.columns.map((column) => column.precision))];
  const names = ["Bundle", "Latency", ...precisions].map((textContent) => element("th", { textContent }));
  const rows = new Map();
  for (const column of about.columns) {
    const key = `${column.bundle}/${column.tier}`;
    if (!rows.has(key)) {
      const cells = [column.bundle, tierName(column)].map((textContent) => element("td", { textContent }));
      rows.set(key, element("tr", {}, ...cells, ...precisions.map(() => element("td"))));
    }
    const box = element("input", { type: "checkbox", value: column.id, onchange: arrange });
    box.setAttribute("aria-label", column.id);
    const cell = rows.get(key).children[2 + precisions.indexOf(column.precision)];
    cell.append(element("label", {}, box, column.precision));
  }
  $("choice").append(element("thead", {}, element("tr", {}, ...names)));
  $("choice").append(element("tbody", {}, ...rows.values()));
}

function first() {
  const chosen = columns.values().next().value;
  return chosen ? chosen.about : about.columns[0];
}

function chooseTiers() {
  const { bundle, precision } = first();
  choose((c) => c.bundle === bundle && c.precision === precision);
}

// At the latency that all have, 320 ms if they do.
function chooseBundles() {
  const { tier, precision } = first();
  const count = new Set(about.columns.map((c) => c.bundle)).size;
  const shared = [tier, "320", ...about.columns.map((c) => c.tier)].find(
    (t) => about.columns.filter((c) => c.tier === t && c.precision === precision).length === count,
  );
  choose((c) => c.tier === (shared ?? tier) && c.precision === precision);
}

function choosePrecisions() {
  const { bundle, tier } = first();
  choose((c) => c.bundle === bundle && c.tier === tier);
}

// ---- what is heard ----

let session = null;

class Session {
  // open: gives {context, source, length}; its errors are said as they are.
  async run(open) {
    for (const column of columns.values()) column.clear();
    let opened;
    try {
      opened = await open();
    } catch (error) {
      return this.end(error.message, true);
    }
    Object.assign(this, opened); // context, source, length, stop
    if (this.hasEnded) return this.release();
    this.begin = Infinity;
    this.sent = this.silent = 0;
    this.rate = this.context.sampleRate;
    say("Loading the models …");
    this.socket = new WebSocket(`${location.origin.replace("http", "ws")}/speech`);
    this.socket.onopen = () =>
      this.tell({ type: "start", rate: this.rate, columns: [...columns.keys()] });
    this.socket.onmessage = ({ data }) => this.receive(JSON.parse(data));
    this.socket.onclose = ({ reason }) => this.end(reason || GONE, true);
  }

  tell(tree) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(tree));
  }

  async receive(message) {
    if (message.type === "ready") await this.listen();
    else if (message.type === "heard") columns.get(message.column)?.hear(message, this.begin, this.sent);
    else if (message.type === "load") this.drawLoad(message);
    else if (message.type === "done") this.end("All was heard.");
    else if (message.type === "error") this.end(message.message, true);
  }

  drawLoad({ cpu, cores, streams, behind }) {
    const late = behind > 1 ? `, ${behind.toFixed(0)} s behind` : "";
    $("load").textContent = `CPU ${(100 * cpu).toFixed(0)} % of ${100 * cores} %, ${streams} streams${late}`;
  }

  async listen() {
    const { context, source } = this;
    await context.audioWorklet.addModule("/capture.js");
    await context.resume();
    this.capture = new AudioWorkletNode(context, "capture", {
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { length: this.length },
    });
    this.capture.port.onmessage = ({ data }) => this.send(data);
    source.connect(this.capture).connect(context.destination); // its output is silent
    if (this.length) {
      source.connect(context.destination);
      source.start();
    }
    say(this.length ? "Playing …" : LISTENING);
  }

  // block: Int16Array, or null when there is no more.
  send(block) {
    if (!block) return this.tell({ type: "end" });
    if (this.context.sampleRate !== this.rate) {
      this.rate = this.context.sampleRate;
      this.tell({ type: "rate", rate: this.rate });
    }
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(block);
    this.sent += block.length / this.rate;
    this.begin = Math.min(this.begin, performance.now() - 1000 * this.sent);
    const level = block.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
    $("level").value = level / 32768;
    if (this.length) return;
    const wasSilent = this.silent > SILENT_SECONDS;
    this.silent = level ? 0 : this.silent + block.length / this.rate;
    if (!wasSilent && this.silent > SILENT_SECONDS) say(MUTED, true);
    if (wasSilent && level) say(LISTENING);
  }

  finish(why = "") {
    if (why) say(why, true);
    if (this.capture) this.capture.port.postMessage("end");
    else this.end("Stopped.");
  }

  end(text, isBad = false) {
    if (this.hasEnded) return;
    this.hasEnded = true;
    if (isBad || !$("message").classList.contains("bad")) say(text, isBad);
    this.release();
    session = null;
    control();
  }

  release() {
    this.socket?.close();
    this.stop?.();
    this.context?.close();
    $("level").value = 0;
  }
}

async function openMicrophone() {
  if (!navigator.mediaDevices)
    throw Error(
      `Browsers give the microphone to pages of this machine or over HTTPS only: open http://localhost:${location.port}, ` +
        `over ssh -L ${location.port}:localhost:${location.port} if the server is elsewhere.`,
    );
  const raw = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: raw });
  } catch (error) {
    const others = "or play test speech, or choose a sound file";
    const reasons = {
      NotAllowedError: `The browser did not permit the microphone: allow it beside the page's address and press Microphone again, ${others}.`,
      NotFoundError: `There is no microphone: connect one and press Microphone again, ${others}.`,
      NotReadableError: `The microphone cannot be opened, perhaps another program has it: end that and press Microphone again, ${others}.`,
    };
    throw Error(reasons[error.name] ?? `The microphone cannot be opened (${error.message}): try again, ${others}.`);
  }
  const context = new AudioContext();
  const [track] = stream.getTracks();
  track.onended = () => session?.finish("The microphone went away: connect one and press Microphone again.");
  return { context, source: context.createMediaStreamSource(stream), stop: () => track.stop() };
}

async function openSound(bytes, name) {
  const context = new AudioContext({ sampleRate: 16000 });
  let buffer;
  try {
    buffer = await context.decodeAudioData(bytes);
  } catch {
    await context.close();
    throw Error(`${name} cannot be read as sound: ffmpeg -i FILE -ar 16000 -ac 1 out.wav makes a file that can.`);
  }
  const source = new AudioBufferSourceNode(context, { buffer });
  return { context, source, length: buffer.length };
}

function start(open, text = "") {
  if (session) return;
  if (!columns.size) return say("Choose a model first: tick at least one below.", true);
  $("said").hidden = !text;
  $("said").textContent = text ? `Said: ${text}` : "";
  say("");
  if (innerWidth < NARROW) document.querySelector("details").open = false; // the words, in view
  session = new Session();
  control();
  session.run(open);
}

function playFile(file) {
  if (file.size > LONGEST_FILE)
    return say(`${file.name} has ${Math.round(file.size / 1e6)} MB, 200 at most: cut it.`, true);
  start(async () => openSound(await file.arrayBuffer(), file.name));
}

function playRecording({ url, text }) {
  start(async () => openSound(await (await fetch(url)).arrayBuffer(), url), text);
}

function control() {
  const isBusy = session !== null;
  for (const input of document.querySelectorAll("button, input")) input.disabled = isBusy;
  $("stop").disabled = !isBusy;
}

async function main() {
  $("microphone").onclick = () => start(openMicrophone);
  $("stop").onclick = () => session?.finish();
  $("file").onchange = ({ target }) => {
    if (target.files.length) playFile(target.files[0]);
    target.value = "";
  };
  document.ondragover = (event) => event.preventDefault();
  document.ondragenter = () => document.body.classList.add("over");
  document.ondragleave = ({ relatedTarget }) => relatedTarget || document.body.classList.remove("over");
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    if (event.dataTransfer.files.length) playFile(event.dataTransfer.files[0]);
  };
  $("all-tiers").onclick = chooseTiers;
  $("all-precisions").onclick = choosePrecisions;
  $("all-bundles").onclick = chooseBundles;
  Object.assign(about, await (await fetch("/columns.json")).json());
  drawChoice();
  for (const recording of about.recordings) {
    const name = about.recordings.length > 1 ? ` of ${recording.bundles.join(", ")}` : "";
    const textContent = `Test speech${name}, ${recording.seconds} s`;
    $("recordings").append(element("button", { textContent, onclick: () => playRecording(recording) }));
  }
  $("all-bundles").hidden = new Set(about.columns.map((c) => c.bundle)).size < 2;
  if ($("all-bundles").hidden) chooseTiers();
  else chooseBundles();
}

main();
