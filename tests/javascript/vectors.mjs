// Writes what transformers.js computes with an exported folder, as JSON.
// Usage: node vectors.mjs REQUEST.json ANSWER.json; the request is {folder, dtype, padding, texts, images}.
import { readFileSync, writeFileSync } from "node:fs";
import {
  AutoProcessor,
  AutoTokenizer,
  CLIPTextModelWithProjection,
  CLIPVisionModelWithProjection,
  RawImage,
  env,
} from "@huggingface/transformers";

const [, , request, answer] = process.argv;
const { folder, dtype, padding, texts, images } = JSON.parse(readFileSync(request, "utf-8"));
env.allowRemoteModels = false;

const processor = await AutoProcessor.from_pretrained(folder);
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const vision = await CLIPVisionModelWithProjection.from_pretrained(folder, { dtype });
const text = await CLIPTextModelWithProjection.from_pretrained(folder, { dtype });

const tokens = tokenizer(texts, { padding, truncation: true });
const { text_embeds } = await text(tokens);
const pixels = await processor(await Promise.all(images.map((path) => RawImage.read(path))));
const { image_embeds } = await vision(pixels);

writeFileSync(
  answer,
  JSON.stringify({
    ids: tokens.input_ids.tolist().map((row) => row.map(Number)),
    texts: text_embeds.tolist(),
    pixels: pixels.pixel_values.tolist(),
    images: image_embeds.tolist(),
  }),
);
