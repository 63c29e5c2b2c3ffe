// Ask a question about an image in S3 and print the answer:
//
//   npm install
//   node ask.mjs s3://photos/table.jpg "Which fruit is on the table?"
//
// VQA_RABBITMQ_URL and VQA_JOBS_QUEUE are those of the worker.

import { randomUUID } from 'node:crypto';
import { connect } from 'amqplib';

const url = process.env.VQA_RABBITMQ_URL ?? 'amqp://guest:guest@localhost:5672/';
const jobsQueue = process.env.VQA_JOBS_QUEUE ?? 'vqa.jobs';
const [image, question] = process.argv.slice(2);

const connection = await connect(url);
try {
  const result = await ask({
    question,
    images: [image],
    params: { max_tokens: 200 },
    metadata: { asked_by: 'the example' },
  });
  if (result.status === 'succeeded') {
    console.log(result.answer);
  } else {
    console.error(`${result.error.code}: ${result.error.message}`);
    process.exitCode = 1;
  }
} finally {
  await connection.close();
}

// Publish a job and return its result. A service would keep the channel and its reply queue.
async function ask(job, timeoutMs = 120_000) {
  const id = randomUUID();
  // After the timeout the answer is no longer needed and must not be billed.
  const deadline = new Date(Date.now() + timeoutMs).toISOString();
  const channel = await connection.createConfirmChannel();
  // An exclusive, server-named queue; the workers allow amq.gen-… by default.
  const replies = await channel.assertQueue('', { exclusive: true });

  const result = new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error(`no result within ${timeoutMs} ms`)), timeoutMs).unref();
    // An unroutable message is returned before its confirm.
    channel.on('return', () => reject(new Error(`the queue ${jobsQueue} does not exist`)));
    channel.consume(replies.queue, (message) => {
      if (message?.properties.correlationId !== id) return;
      channel.ack(message);
      resolve(JSON.parse(message.content.toString()));
    });
  });

  channel.sendToQueue(jobsQueue, Buffer.from(JSON.stringify({ id, deadline, ...job })), {
    persistent: true,
    mandatory: true,
    contentType: 'application/json',
    messageId: id,
    correlationId: id,
    replyTo: replies.queue,
    timestamp: Math.floor(Date.now() / 1000),
  });
  // Confirmed: RabbitMQ has stored the job.
  const [, received] = await Promise.all([channel.waitForConfirms(), result]);
  return received;
}
