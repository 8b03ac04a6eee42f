/* SPDX-License-Identifier: MIT */
/* Browsers refuse workers to pages that are opened from the disk. There, search runs in a frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => {
        const message = new MessageEvent("message", { data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      };
      inside.importScripts = (...scripts) =>
        scripts.reduce(
          (before, src) => before.then(() => this.load(inside, src)),
          Promise.resolve()
        );
      this.inside = inside;
      this.load(inside, url).then(() => {
        for (const data of this.waiting) this.send(data);
        this.waiting = null;
      });
    }
    load(inside, src) {
      return new Promise((resolve, reject) => {
        const script = inside.document.createElement("script");
        script.src = src;
        script.onload = resolve;
        script.onerror = reject;
        inside.document.body.appendChild(script);
      });
    }
    send(data) {
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }));
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.send(data);
    }
    terminate() {
      this.inside.frameElement.remove();
    }
  };
}
