// One stream connection (virtio 1.2 §5.10) that a program of the host opens to port 5000.
//
// `send` sends `ops` packets of `size` bytes, `depth` in flight; `receive` takes `ops` times `size` bytes; `ping` sends
// `size` bytes, waits for as many to come back, and so on. Both directions are the words (N + 1) * PATTERN from N = 0 on.
// Of what comes the first and the last byte of each packet are looked at, with `check=1` all.

#include "virtio.h"

enum { RX, TX, EVENT };
enum { REQUEST = 1, RESPONSE = 2, RESET = 3, SHUTDOWN = 4, DATA = 5, CREDIT_UPDATE = 6, CREDIT_REQUEST = 7 };
enum { STREAM = 1, HOST_CID = 2, PORT = 5000 };
enum { RX_LENGTH = 4096, BUFFERED = 256 << 10 }; // as Linux has it: a receive buffer, and what a socket has room for
enum { MAX_DEPTH = 64, MAX_SIZE = 60 << 10, STRIDE = 64 << 10 };
enum { RX_BUFFERS = BUFFER_AREA, TX_BUFFERS = BUFFER_AREA + QUEUE_SIZE * RX_LENGTH };
enum { CONTROL = MAX_DEPTH }; // the slot of packets without data, behind those with
#define PATTERN 0x9e3779b97f4a7c15ul

struct __attribute__((packed)) packet {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, length;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
    u8 data[];
};

static struct device dev;
static u64 cid, sent, received, in_flight;
static u32 host_port, peer_room, peer_forwarded, told;
static u16 free_slots[MAX_DEPTH], free_count;
static int connected, control_busy, update_due;

static struct packet *tx_packet(u16 slot) { return (struct packet *)(TX_BUFFERS + (u64)slot * STRIDE); }

static void transmit(u16 slot, u16 op, u32 length)
{
    struct packet *p = tx_packet(slot);
    *p = (struct packet){ .src_cid = cid, .dst_cid = HOST_CID, .src_port = PORT, .dst_port = host_port,
                          .length = length, .type = STREAM, .op = op, .buf_alloc = BUFFERED, .fwd_cnt = received };
    told = received;
    update_due = 0;
    queue_describe(&dev.queues[TX], slot, p, sizeof *p + length, 0, 0);
    queue_fill(&dev.queues[TX], slot);
}

static void send_data(void)
{
    u16 slot = free_slots[--free_count];
    u64 *words = (u64 *)tx_packet(slot)->data, value = (sent / 8 + 1) * PATTERN;
    for (u64 i = 0; i < measure.size / 8; i++, value += PATTERN)
        words[i] = value;
    transmit(slot, DATA, measure.size);
    sent += measure.size;
    in_flight++;
}

static int right(const u8 *data, u64 length)
{
    u64 step = measure.check || length == 1 ? 1 : length - 1;
    for (u64 i = 0; i < length; i += step) {
        u64 at = received + i;
        if (data[i] != (u8)((at / 8 + 1) * PATTERN >> at % 8 * 8))
            return 0;
    }
    return 1;
}

// Does what one packet says; 0 when the connection is over, which was told.
static int handle(struct used_element element)
{
    struct packet *p = (struct packet *)(RX_BUFFERS + (u64)(element.head % QUEUE_SIZE) * RX_LENGTH);
    int good = 1;
    if (element.length < sizeof *p || p->length > element.length - sizeof *p) {
        fail("vsock", "a packet is shorter than it says");
        return 0;
    }
    if (p->op == REQUEST && !connected && p->dst_port == PORT) {
        host_port = p->src_port;
        connected = 1;
        transmit(CONTROL, RESPONSE, 0);
        control_busy = 1;
    } else if (p->op == RESET || p->op == SHUTDOWN) {
        fail("vsock", "the host has ended the connection");
        return 0;
    } else if (p->op == DATA) {
        good = right(p->data, p->length);
        if (!good)
            fail_at("vsock", "what was received is not what was sent", received);
        received += p->length;
        update_due |= (u32)received - told >= BUFFERED / 2;
    } else if (p->op == CREDIT_REQUEST)
        update_due = 1;
    peer_room = p->buf_alloc;
    peer_forwarded = p->fwd_cnt;
    queue_fill(&dev.queues[RX], element.head);
    return good;
}

// Takes what was completed, both ways, and waits for something when there is nothing.
static int pump(void)
{
    struct queue *rx = &dev.queues[RX], *tx = &dev.queues[TX];
    struct used_element element;
    u64 start = now();
    for (int some = 0; !some;) {
        while (queue_take(tx, &element)) {
            some = 1;
            if (element.head == CONTROL)
                control_busy = 0;
            else if (free_count < MAX_DEPTH)
                free_slots[free_count++] = element.head, in_flight--;
        }
        while (queue_take(rx, &element)) {
            some = 1;
            if (!handle(element))
                return 0;
        }
        if (update_due && !control_busy) {
            transmit(CONTROL, CREDIT_UPDATE, 0);
            control_busy = 1;
        }
        queue_publish(rx);
        queue_publish(tx);
        if (!some && now() - start > measure.patience) {
            fail("vsock", device_broken(&dev) ? "the device needs a reset" : "nothing happens any more");
            return 0;
        }
    }
    return 1;
}

static int has_credit(void) { return peer_room - ((u32)sent - peer_forwarded) >= measure.size; }

static int run_send(u64 ops)
{
    for (u64 i = 0; i < ops || in_flight;) {
        for (; i < ops && free_count && has_credit(); i++)
            send_data();
        queue_publish(&dev.queues[TX]);
        if (!pump())
            return 0;
    }
    return 1;
}

static int run_receive(u64 ops)
{
    for (u64 until = received + ops * measure.size; received < until;)
        if (!pump())
            return 0;
    return 1;
}

static int run_ping(u64 ops)
{
    for (u64 i = 0; i < ops; i++) {
        u64 start = now(), until = received + measure.size;
        while (!free_count || !has_credit())
            if (!pump())
                return 0;
        send_data();
        queue_publish(&dev.queues[TX]);
        while (received < until)
            if (!pump())
                return 0;
        latency_add(now() - start);
    }
    return 1;
}

static int prepare(void)
{
    if (!device_start(&dev, DEVICE_VSOCK, 0, QUEUES, "vsock"))
        return 0;
    if (dev.queues[TX].size <= CONTROL) {
        fail("vsock", "the queue is too small");
        return 0;
    }
    cid = device_config(&dev, 0);
    sent = received = in_flight = connected = control_busy = update_due = told = 0;
    for (free_count = 0; free_count < measure.depth; free_count++)
        free_slots[free_count] = free_count;
    for (u16 i = 0; i < dev.queues[RX].size; i++) {
        queue_describe(&dev.queues[RX], i, (void *)(RX_BUFFERS + (u64)i * RX_LENGTH), RX_LENGTH, DESC_WRITE, 0);
        queue_fill(&dev.queues[RX], i);
    }
    queue_publish(&dev.queues[RX]);
    print("probe: listens\n");
    while (!connected || control_busy)
        if (!pump())
            return 0;
    return 1;
}

void vsock(const char *way)
{
    int (*run)(u64 ops) = equal(way, "send") ? run_send
                          : equal(way, "receive") ? run_receive
                          : equal(way, "ping") ? run_ping : 0;
    const char *why = !run ? "there is send, receive and ping"
                      : measure.size == 0 || measure.size % 8 || measure.size > MAX_SIZE ? "size is no multiple of 8 up to 61440"
                      : measure.depth == 0 || measure.depth > MAX_DEPTH ? "depth is not from 1 to 64" : 0;
    if (why) {
        fail("vsock", why);
        return;
    }
    if (!prepare() || !run(measure.warm))
        return;
    struct result result;
    if (!measured(&dev, run, &result))
        return;
    report("vsock", measure.ops, result.cycles);
    if (run == run_ping)
        latency_print();
    report("kicks", result.kicks, result.cycles);
}
