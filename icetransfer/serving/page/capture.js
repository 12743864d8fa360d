// Hands what is heard to the page in blocks of 16-bit samples, of any source.

const BLOCK_SECONDS = 0.05;

class Capture extends AudioWorkletProcessor {
  // length: samples of a source that ends by itself; of a microphone there is none.
  constructor({ processorOptions: { length = Infinity } }) {
    super();
    this.left = length;
    this.block = new Int16Array(Math.round(sampleRate * BLOCK_SECONDS));
    this.filled = 0;
    this.hasEnded = false;
    this.port.onmessage = () => this.end();
  }

  process([input]) {
    const samples = input[0]; // the node mixes channels; nothing while the source does not play
    if (!samples || this.hasEnded) return !this.hasEnded;
    for (let i = 0; i < samples.length && this.left > 0; i++, this.left--) {
      this.block[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(samples[i] * 32768)));
      if (this.filled === this.block.length) this.flush();
    }
    if (this.left === 0) this.end();
    return !this.hasEnded;
  }

  flush() {
    const block = this.block.slice(0, this.filled);
    this.filled = 0;
    if (block.length) this.port.postMessage(block, [block.buffer]);
  }

  end() {
    if (this.hasEnded) return;
    this.hasEnded = true;
    this.flush();
    this.port.postMessage(null);
  }
}

registerProcessor("capture", Capture);
