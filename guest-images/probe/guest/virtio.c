#include "virtio.h"

enum { REG_MAGIC = 0x00, REG_VERSION = 0x04, REG_DEVICE = 0x08, REG_FEATURES = 0x10, REG_FEATURES_SEL = 0x14,
       REG_DRIVER_FEATURES = 0x20, REG_DRIVER_FEATURES_SEL = 0x24, REG_QUEUE_SEL = 0x30, REG_QUEUE_MAX = 0x34,
       REG_QUEUE_SIZE = 0x38, REG_QUEUE_READY = 0x44, REG_NOTIFY = 0x50, REG_STATUS = 0x70, REG_QUEUE_DESC = 0x80,
       REG_QUEUE_DRIVER = 0x90, REG_QUEUE_DEVICE = 0xa0, REG_CONFIG = 0x100 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 0x40 };
enum { NO_INTERRUPT = 1, NO_NOTIFY = 1 };
#define MAGIC 0x74726976
#define MAPPED (4ul << 30)

static volatile u32 *reg(volatile u8 *window, u32 offset) { return (volatile u32 *)(window + offset); }

// The address in a word of Linux's form `virtio_mmio.device=SIZE@ADDRESS:IRQ`, which VMMs put on the command line.
static u64 announced(const char **text)
{
    static const char key[] = "virtio_mmio.device=";
    for (const char *p = *text; *p; p++) {
        const char *a = p, *k = key;
        while (*k && *a == *k)
            a++, k++;
        if (*k)
            continue;
        while (*a && *a != '@' && *a != ' ')
            a++;
        *text = a;
        if (*a++ != '@')
            return 0;
        u64 address = number(&a);
        *text = a;
        return address < MAPPED ? address : 0;
    }
    *text = "";
    return 0;
}

static volatile u8 *find(u32 kind)
{
    const char *text = command_line;
    while (*text) {
        volatile u8 *window = (volatile u8 *)announced(&text);
        if (window && *reg(window, REG_MAGIC) == MAGIC && *reg(window, REG_VERSION) == 2 &&
            *reg(window, REG_DEVICE) == kind)
            return window;
    }
    return 0;
}

static void set_address(volatile u8 *window, u32 offset, u64 address)
{
    *reg(window, offset) = address;
    *reg(window, offset + 4) = address >> 32;
}

static int start_queue(struct device *device, u16 n)
{
    volatile u8 *window = device->window;
    struct queue *q = &device->queues[n];
    u64 area = QUEUE_AREA + (u64)n * QUEUE_STRIDE;
    *reg(window, REG_QUEUE_SEL) = n;
    u32 most = *reg(window, REG_QUEUE_MAX);
    if (most == 0)
        return 0;
    fill((void *)area, 0, QUEUE_STRIDE);
    fill(q, 0, sizeof *q);
    q->number = n;
    q->size = most < QUEUE_SIZE ? most : QUEUE_SIZE;
    q->table = (struct descriptor *)area;
    q->available = (volatile u16 *)(area + 0x1000);
    q->used = (volatile u16 *)(area + 0x2000);
    q->notify = reg(window, REG_NOTIFY);
    q->event_index = (device->features & F_EVENT_IDX) != 0;
    q->available[0] = q->event_index ? 0 : NO_INTERRUPT;
    q->available[2 + q->size] = 0xffff; // far from every index that comes soon; see queue_publish
    *reg(window, REG_QUEUE_SIZE) = q->size;
    set_address(window, REG_QUEUE_DESC, area);
    set_address(window, REG_QUEUE_DRIVER, area + 0x1000);
    set_address(window, REG_QUEUE_DEVICE, area + 0x2000);
    *reg(window, REG_QUEUE_READY) = 1;
    return 1;
}

int device_start(struct device *device, u32 kind, u64 wanted, u32 queues, const char *what)
{
    volatile u8 *window = find(kind);
    if (!window) {
        fail(what, "no such device is announced on the command line");
        return 0;
    }
    device->window = window;
    *reg(window, REG_STATUS) = 0;
    *reg(window, REG_STATUS) = ACKNOWLEDGE | DRIVER;
    device->features = 0;
    for (u32 half = 0; half < 2; half++) {
        *reg(window, REG_FEATURES_SEL) = half;
        device->features |= (u64)*reg(window, REG_FEATURES) << 32 * half;
    }
    device->features &= wanted | F_EVENT_IDX | F_VERSION_1;
    for (u32 half = 0; half < 2; half++) {
        *reg(window, REG_DRIVER_FEATURES_SEL) = half;
        *reg(window, REG_DRIVER_FEATURES) = device->features >> 32 * half;
    }
    *reg(window, REG_STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    if (!(*reg(window, REG_STATUS) & FEATURES_OK)) {
        fail(what, "the device refuses the features");
        return 0;
    }
    for (u16 n = 0; n < queues; n++)
        if (!start_queue(device, n)) {
            fail(what, "the device lacks a queue");
            return 0;
        }
    *reg(window, REG_STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    return 1;
}

int device_broken(const struct device *device) { return (*reg(device->window, REG_STATUS) & NEEDS_RESET) != 0; }

u32 device_config(const struct device *device, u32 offset) { return *reg(device->window, REG_CONFIG + offset); }

void queue_describe(struct queue *q, u16 at, const void *memory, u64 length, u16 flags, u16 next)
{
    q->table[at] = (struct descriptor){ (u64)memory, length, flags, next };
}

void queue_fill(struct queue *q, u16 head) { q->available[2 + q->filled++ % q->size] = head; }

void queue_publish(struct queue *q)
{
    if (q->filled == q->published)
        return;
    // The last index that the device used, which it will not reach again before 65,535 others: no interrupt.
    q->available[2 + q->size] = q->taken - 1;
    __asm__ volatile("" : : : "memory");
    q->available[1] = q->filled;
    __asm__ volatile("mfence" : : : "memory");
    u16 wish = q->used[2 + 4 * q->size]; // avail_event
    if (q->event_index ? (u16)(q->filled - wish - 1) < (u16)(q->filled - q->published) : !(q->used[0] & NO_NOTIFY)) {
        *q->notify = q->number;
        q->kicks++;
    }
    q->published = q->filled;
}

int queue_take(struct queue *q, struct used_element *element)
{
    if (q->used[1] == q->taken)
        return 0;
    __asm__ volatile("" : : : "memory");
    *element = *(struct used_element *)((u64)(q->used + 2) + 8ul * (q->taken % q->size));
    q->taken++;
    return 1;
}

int queue_wait(const struct device *device, struct queue *q, const char *what)
{
    u64 start = now();
    while (q->used[1] == q->taken) {
        __asm__ volatile("pause");
        if (now() - start > measure.patience) {
            fail(what, device_broken(device) ? "the device needs a reset" : "nothing was completed any more");
            return 0;
        }
    }
    return 1;
}
