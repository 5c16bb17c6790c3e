// A driver for virtio devices behind MMIO registers, version 2 (virtio 1.2 §4.2), with split rings (§2.7). It polls: no
// interrupt is asked for. Every structure lies in memory that the smallest guest has.
#include "probe.h"

enum { DEVICE_NET = 1, DEVICE_BLOCK = 2, DEVICE_VSOCK = 19 };
enum { QUEUES = 3, QUEUE_SIZE = 256 };
enum { QUEUE_AREA = 8 << 20, QUEUE_STRIDE = 0x4000 };       // rings of QUEUES queues
enum { BUFFER_AREA = 9 << 20, BUFFER_END = 15 << 20 };      // the drivers' buffers
enum { DESC_NEXT = 1, DESC_WRITE = 2 };                     // DESC_WRITE: for the device to write
#define F_EVENT_IDX (1ul << 29)
#define F_VERSION_1 (1ul << 32)

struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

struct used_element {
    u32 head, length;
};

struct queue {
    struct descriptor *table;
    volatile u16 *available; // flags, index, ring[QUEUE_SIZE], used_event
    volatile u16 *used;      // flags, index, elements of 8 bytes, avail_event
    volatile u32 *notify;
    u16 number, size;
    u16 filled;    // index behind the last chain that was made available
    u16 published; // what the device was told of it
    u16 taken;     // index of the next used element
    int event_index; // EVENT_IDX was negotiated
    u64 kicks;     // notifications written
};

struct device {
    volatile u8 *window;
    u64 features;
    struct queue queues[QUEUES];
};

int device_start(struct device *device, u32 kind, u64 wanted, u32 queues, const char *what); // 0: failed, and was told
int device_broken(const struct device *device); // it wants to be reset
u32 device_config(const struct device *device, u32 offset);
void queue_describe(struct queue *queue, u16 at, const void *memory, u64 length, u16 flags, u16 next);
void queue_fill(struct queue *queue, u16 head);
void queue_publish(struct queue *queue);        // and notifies, when the device wants it
int queue_take(struct queue *queue, struct used_element *element); // 0: nothing was completed
int queue_wait(const struct device *device, struct queue *queue, const char *what); // 0: stuck, and was told

// measure.c
struct result {
    u64 cycles;
    u64 kicks; // notifications that the driver wrote
};
// Runs measure.ops operations on the device between "probe: begins" and "probe: ends"; 0: failed, and was told
int measured(const struct device *device, int (*run)(u64 ops), struct result *result);
