// Ethernet frames of `size` bytes (virtio 1.2 §5.1) with a type of their own, which no protocol of the host takes up:
//
//   destination, source (6 bytes each), type 0x88b5, word: NUMBER, word: NUMBER * PATTERN, then zeros
//
// `send` sends `ops` of them, `depth` in flight; `receive` takes `ops` of them; `ping` sends one, waits for it to come
// back, and so on.

#include "virtio.h"

enum { RX, TX };
enum { HEADER = 12, FRAME_LEAST = 60, FRAME_MOST = 1514, BUFFER = 2048, TYPE = 0xb588 };
enum { RX_BUFFERS = BUFFER_AREA, TX_BUFFERS = BUFFER_AREA + QUEUE_SIZE * BUFFER };
#define PATTERN 0x9e3779b97f4a7c15ul
#define NO_NUMBER (~0ul)

struct __attribute__((packed)) frame {
    u8 header[HEADER];
    u8 destination[6], source[6];
    u16 type;
    u64 number, echo;
};

static struct device nic;
static u64 expected, lost;

static struct frame *buffer(u64 area, u16 at) { return (struct frame *)(area + (u64)at * BUFFER); }

static void send(u16 at, u64 number)
{
    struct frame *frame = buffer(TX_BUFFERS, at);
    frame->number = number;
    frame->echo = number * PATTERN;
    queue_fill(&nic.queues[TX], at);
}

static void prepare(void)
{
    fill((void *)BUFFER_AREA, 0, 2 * QUEUE_SIZE * BUFFER);
    for (u16 i = 0; i < nic.queues[RX].size; i++) {
        queue_describe(&nic.queues[RX], i, buffer(RX_BUFFERS, i), BUFFER, DESC_WRITE, 0);
        queue_fill(&nic.queues[RX], i);
    }
    for (u16 i = 0; i < nic.queues[TX].size; i++) {
        struct frame *frame = buffer(TX_BUFFERS, i);
        fill(frame->destination, 0xff, 6);
        frame->source[0] = 2; // locally administered
        frame->type = TYPE;
        queue_describe(&nic.queues[TX], i, frame, HEADER + measure.size, 0, 0);
    }
    queue_publish(&nic.queues[RX]);
}

// Takes one frame off the receive queue and gives the buffer back: its number, or NO_NUMBER when it is none of ours.
static u64 take(struct used_element element)
{
    struct frame *frame = buffer(RX_BUFFERS, element.head % QUEUE_SIZE);
    u64 number = NO_NUMBER;
    if (element.length >= sizeof *frame && frame->type == TYPE && frame->echo == frame->number * PATTERN)
        number = frame->number;
    frame->type = 0;
    queue_fill(&nic.queues[RX], element.head);
    return number;
}

static int run_send(u64 ops)
{
    struct queue *q = &nic.queues[TX];
    struct used_element element;
    u64 issued = 0;
    for (; issued < measure.depth && issued < ops; issued++)
        send(issued, issued);
    queue_publish(q);
    for (u64 done = 0; done < ops;) {
        if (!queue_wait(&nic, q, "net"))
            return 0;
        while (queue_take(q, &element)) {
            done++;
            if (issued < ops)
                send(element.head, issued), issued++;
        }
        queue_publish(q);
    }
    return 1;
}

static int run_receive(u64 ops)
{
    struct queue *q = &nic.queues[RX];
    struct used_element element;
    for (u64 done = 0; done < ops;) {
        if (!queue_wait(&nic, q, "net"))
            return 0;
        while (queue_take(q, &element)) {
            u64 number = take(element);
            if (number == NO_NUMBER)
                continue;
            done++;
            if (number > expected)
                lost += number - expected;
            expected = number + 1;
        }
        queue_publish(q);
    }
    return 1;
}

static int run_ping(u64 ops)
{
    struct used_element element;
    for (u64 i = 0; i < ops; i++) {
        u64 start = now();
        send(0, i);
        queue_publish(&nic.queues[TX]);
        for (int back = 0; !back;) {
            if (!queue_wait(&nic, &nic.queues[RX], "net"))
                return 0;
            while (queue_take(&nic.queues[RX], &element))
                back |= take(element) == i; // others may come before and behind it
            queue_publish(&nic.queues[RX]);
        }
        latency_add(now() - start);
        if (!queue_wait(&nic, &nic.queues[TX], "net"))
            return 0;
        queue_take(&nic.queues[TX], &element);
    }
    return 1;
}

void net(const char *way)
{
    int (*run)(u64 ops) = equal(way, "send") ? run_send
                          : equal(way, "receive") ? run_receive
                          : equal(way, "ping") ? run_ping : 0;
    const char *why = !run ? "there is send, receive and ping"
                      : measure.size < FRAME_LEAST || measure.size > FRAME_MOST ? "size is not from 60 to 1514"
                      : measure.depth == 0 || measure.depth > QUEUE_SIZE ? "depth is not from 1 to 256" : 0;
    if (why) {
        fail("net", why);
        return;
    }
    if (!device_start(&nic, DEVICE_NET, 0, 2, "net"))
        return;
    if (nic.queues[TX].size < measure.depth) {
        fail("net", "the queue is too small for the depth");
        return;
    }
    prepare();
    print("probe: listens\n"); // the host may begin to send
    if (!run(measure.warm))
        return;
    lost = 0;
    struct result result;
    if (!measured(&nic, run, &result))
        return;
    report("net", measure.ops, result.cycles);
    if (run == run_receive)
        report("lost", lost, result.cycles);
    if (run == run_ping)
        latency_print();
    report("kicks", result.kicks, result.cycles);
}
