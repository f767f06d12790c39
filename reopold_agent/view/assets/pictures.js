"use strict";
/* Shows pictures as the model saw them; boxes mark the parts that tools showed. */

const BOX_COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2"];

/**
 * Boxes of an episode's tool calls: [{ call, image, box, result, asked }]. `call` counts from 1 over
 * the calls, `image` and `result` are numbers of pictures from 1; `result` is the picture that shows
 * the part (null if none). Without a record of regions, which older runs lack, the box that the
 * model asked for stands in (`asked`), where it is in shares of the picture.
 */
function boxesOf(turns, results) {
  const boxes = [];
  let call = 0;
  turns.forEach((turn, t) => {
    if (!turn.call) return;
    call += 1;
    const regions = Array.isArray(turn.call.regions) ? turn.call.regions : askedRegions(turn.call);
    regions.forEach((region, i) => {
      if (!region || !isBox(region.box)) return;
      boxes.push({
        call, image: region.image, box: region.box, result: (results[t] || [])[i] ?? null,
        asked: !Array.isArray(turn.call.regions), name: String(turn.call.name),
      });
    });
  });
  return boxes;
}

function isBox(box) {
  return Array.isArray(box) && box.length === 4 && box.every(v => isNumber(v) && v >= 0 && v <= 1);
}

function askedRegions(call) {
  const given = call.arguments && typeof call.arguments === "object" ? call.arguments : {};
  if (!call.ok) return [];
  if (isBox(given.bbox_2d)) return [{ image: isNumber(given.target_image) ? given.target_image : 1, box: given.bbox_2d }];
  if (Array.isArray(given.target_frames)) return given.target_frames.filter(isNumber).map(image => ({ image, box: [0, 0, 1, 1] }));
  return [];
}

/** Draws the pictures with these numbers and their boxes. */
function drawPictures(pictures, numbers, boxes) {
  return el(numbers.length > 2 ? "div.pictures.many" : "div.pictures", null, numbers.filter(n => pictures[n - 1]).map(n => onePicture(pictures[n - 1], n, boxes)));
}

function onePicture(picture, number, boxes) {
  const own = boxes.filter(b => b.image === number);
  const source = boxes.find(b => b.result === number);
  const caption = el("figcaption", null, `picture ${number}`, picture.size ? el("span.quiet", null, ` ${picture.size}`) : null,
    source ? el("span.quiet", null, `, ${wholePicture(source.box) ? "shows again" : "part of"} picture ${source.image}`) : null);
  if (!picture.source) return el("figure.picture", null, el("p.note", null, picture.name ? `The picture ${picture.name} is missing.` : "This picture was not saved."), caption);
  const image = el("img", { src: picture.source, alt: `picture ${number}`, loading: "lazy" });
  const frame = el("button.frame", { type: "button", title: "show it large", onclick: () => showLarge(picture, number, own) }, image, boxLayer(own));
  image.addEventListener("load", () => fitSmall(image));
  image.addEventListener("error", () => frame.replaceWith(el("p.note", null, `The picture ${picture.name} cannot be shown: missing or damaged.`)));
  return el("figure.picture", { data: { picture: number } }, frame, caption);
}

/* Enlarges a small picture up to four times; less where many are shown. */
function fitSmall(image) {
  const side = image.closest(".many") ? 160 : 240;
  const times = side / Math.max(image.naturalWidth, image.naturalHeight);
  if (times <= 1) return;
  image.style.width = `${Math.round(image.naturalWidth * Math.min(times, 4))}px`;
  image.classList.toggle("pixels", times >= 2);
}

function wholePicture(box) {
  return box[0] === 0 && box[1] === 0 && box[2] === 1 && box[3] === 1;
}

function boxLayer(boxes) {
  return boxes.length ? svg("svg.boxes", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": true },
    boxes.map(b => svg("g", { "data-call": b.call },
      svg("title", null, `${b.asked ? "requested by" : "shown by"} call ${b.call}, ${b.name}`),
      ["box-edge", "box"].map(kind => svg(`rect.${kind}${b.asked ? ".asked" : ""}`, {
        x: b.box[0], y: b.box[1], width: b.box[2] - b.box[0], height: b.box[3] - b.box[1],
        ...(kind === "box" ? { stroke: BOX_COLOURS[(b.call - 1) % BOX_COLOURS.length] } : {}),
      }))))) : null;
}

function showLarge(picture, number, boxes) {
  const dialog = document.getElementById("big");
  const image = el("img", { src: picture.source, alt: `picture ${number}` });
  image.addEventListener("load", () => {
    const times = Math.min(innerWidth * 0.9 / image.naturalWidth, innerHeight * 0.8 / image.naturalHeight);
    image.style.width = `${Math.floor(image.naturalWidth * times)}px`;
    image.classList.toggle("pixels", times >= 2);
  });
  dialog.replaceChildren(el("form", { method: "dialog" }, el("button", { type: "submit" }, "Close"), ` picture ${number} ${picture.size || ""}`),
    el("div.frame", null, image, boxLayer(boxes)));
  dialog.showModal();
}

/** Makes the mark that links a call to its box. */
function callBadge(number) {
  const badge = el("span.badge", null, String(number));
  badge.style.borderColor = BOX_COLOURS[(number - 1) % BOX_COLOURS.length];
  return badge;
}
