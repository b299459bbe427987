// What the server is asked, and the images that it or the user has.

import { say } from "./dom.js";

let key = "";
const uploads = new Map(); // name of an upload → address of the user's own file

export function useGallery(gallery) {
  key = gallery?.key ?? "";
}

/** The answer to a request as JSON; throws an Error with what the server said. */
export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  return answer(await fetch(`/api/${path}`, options));
}

/** Sends an image file; returns the query that means it. */
export async function upload(file) {
  const { upload: name } = await answer(await fetch("/api/upload", { method: "POST", body: file }));
  uploads.set(name, URL.createObjectURL(file));
  return { upload: name };
}

async function answer(response) {
  const values = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw new Error(values.error);
  return values;
}

/** The address of a query's image. */
export const source = (query) =>
  query.upload === undefined ? `/image/${query.image}?v=${key}` : uploads.get(query.upload);

/**
 * A function that does `work` with the latest arguments: while one call runs, only the last of further calls is kept.
 * So a slider asks as fast as the server answers, and no faster.
 */
export function latest(work) {
  let running = false;
  let waiting = null;
  return async function run(...given) {
    waiting = given;
    if (running) return;
    running = true;
    while (waiting !== null) {
      const next = waiting;
      waiting = null;
      try {
        await work(...next);
      } catch (error) {
        say(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message, true);
      }
    }
    running = false;
  };
}
