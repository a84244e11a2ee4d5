"use strict";
const at = (id) => document.getElementById(id);
const rounds = at("rounds"), words = at("words"), state = at("state"), send = at("send"), waiting = [];
let running = null, recorder = null, conversation = "new";

const make = (tag, name, text) => {
  const found = document.createElement(tag);
  if (name) found.className = name;
  if (text !== undefined) found.textContent = text;
  return found;
};
const ascii = (text) => JSON.stringify(text).replace(/[^ -~]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
const post = (path, body, {signal, name = ""} = {}) =>
  fetch(path, {method: "POST", body, signal, headers: {"X-Chat": conversation, "X-Name": ascii(name)}});

async function begin() {
  conversation = (await (await post("/new", "")).json()).conversation;
}

function preview(kind, address, name) {
  const shown = make(kind === "image" ? "img" : kind);
  if (kind === "image") shown.alt = name;
  else { shown.controls = true; shown.title = name; }
  shown.src = address;
  return shown;
}

async function attach(file) {
  const kind = file.type.split("/")[0];
  if (!["image", "audio", "video"].includes(kind)) {
    state.textContent = `${file.name} is no picture, sound or video`;
    return;
  }
  state.textContent = `attaching ${file.name} ...`;
  const answer = await post(`/attach/${kind}`, file, {name: file.name});
  state.textContent = answer.ok ? "" : await answer.text();
  if (!answer.ok) return;
  waiting.push([kind, URL.createObjectURL(file), file.name]);
  at("attached").append(preview(...waiting.at(-1)));
}

// Sound as every reader of clips takes it: the browser's own recording, decoded and written as WAV.
async function asWav(blob) {
  const context = new AudioContext();
  const sound = await context.decodeAudioData(await blob.arrayBuffer());
  await context.close();
  const values = sound.getChannelData(0), bytes = new DataView(new ArrayBuffer(44 + 2 * values.length));
  const text = (place, value) => [...value].forEach((c, i) => bytes.setUint8(place + i, c.charCodeAt(0)));
  text(0, "RIFF"); bytes.setUint32(4, 36 + 2 * values.length, true); text(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true); bytes.setUint16(20, 1, true); bytes.setUint16(22, 1, true);
  bytes.setUint32(24, sound.sampleRate, true); bytes.setUint32(28, 2 * sound.sampleRate, true);
  bytes.setUint16(32, 2, true); bytes.setUint16(34, 16, true); text(36, "data"); bytes.setUint32(40, 2 * values.length, true);
  values.forEach((value, i) => bytes.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, value))), true));
  return new File([bytes], `recording ${new Date().toLocaleTimeString()}.wav`, {type: "audio/wav"});
}

async function record() {
  if (recorder) { recorder.stop(); return; }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({audio: true}), parts = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = (event) => parts.push(event.data);
    recorder.onstop = async () => {
      stream.getTracks().forEach((track) => track.stop());
      recorder = null;
      at("record").textContent = "Record";
      await attach(await asWav(new Blob(parts)));
    };
    recorder.start();
    at("record").textContent = "Stop recording";
  } catch (error) { state.textContent = `the microphone cannot be read: ${error.message}`; }
}

async function ask() {
  const text = words.value.trim();
  if (!text && !waiting.length) return;
  const mine = make("div", "turn mine"), media = make("div", "media"), reply = make("div", "turn"), note = make("div", "note");
  waiting.splice(0).forEach((one) => media.append(preview(...one)));
  if (media.childNodes.length) mine.append(media);
  mine.append(make("div", "", text));
  rounds.append(mine, reply, note);
  at("attached").replaceChildren();
  words.value = "";
  running = new AbortController();
  send.textContent = "Stop";
  let kept = false;
  const line = (row) => {
    if (row.state) note.textContent = row.state;
    if (row.text) reply.append(row.text);
    if (row.error) { note.textContent = row.error; note.className = "note bad"; }
    if (row.kept !== undefined) kept = row.kept;
    note.scrollIntoView({block: "nearest"});
  };
  try {
    const answer = await post("/ask", text, running);
    if (!answer.ok) throw new Error(await answer.text());
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", found = await reader.read(); !found.done; found = await reader.read()) {
      const lines = (rest + found.value).split("\n");
      rest = lines.pop();
      lines.forEach((one) => line(JSON.parse(one)));
    }
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "stopped" : error.message;
    note.className = "note bad";
  }
  if (!kept) {
    note.textContent += "; this round is not kept";
    mine.classList.add("left-out");
    reply.classList.add("left-out");
  }
  running = null;
  send.textContent = "Ask";
  words.focus();
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); if (running) running.abort(); else ask(); });
words.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !running) { event.preventDefault(); ask(); }
});
at("files").addEventListener("change", async (event) => {
  for (const file of event.target.files) await attach(file);
  event.target.value = "";
});
at("record").addEventListener("click", record);
at("new").addEventListener("click", async () => {
  if (running) running.abort();
  await begin();
  waiting.splice(0);
  rounds.replaceChildren();
  at("attached").replaceChildren();
});
const take = (event, items) => {
  if (items.length) event.preventDefault();
  [...items].reduce((before, file) => before.then(() => attach(file)), Promise.resolve());
};
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); take(event, event.dataTransfer.files); });
words.addEventListener("paste", (event) => take(event, event.clipboardData.files));
begin().then(() => words.focus());
