// What the files of the probe share.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

static inline u64 now(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static inline void fill(void *to, u8 value, u64 n)
{
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
}

// probe.c
extern const char *command_line; // all of it, zero-terminated
void print(const char *text);
void print_number(u64 value);
int equal(const char *a, const char *b);
u64 number(const char **text);             // reads a number and moves the pointer behind it
u64 rnd(void);
void report(const char *name, u64 count, u64 cycles); // "probe: NAME COUNT in CYCLES cycles"

// measure.c: what all that is measured with devices has in common
struct measure {
    u64 depth, size, ops, warm, check; // set by the words of these names
    u64 patience;                      // cycles without progress after which a device counts as stuck
};
extern struct measure measure;
void set_measure(const char *key, u64 value); // words of others are passed over
void latency_add(u64 cycles);
void latency_print(void);                    // "probe: latencies CYCLES:COUNT …", some of them on each line
void fail(const char *what, const char *why); // "probe: WHAT error: WHY"
void fail_at(const char *what, const char *why, u64 where); // the same with " at WHERE"

// block.c, net.c, vsock.c: one run each
void block(const char *pattern);
void net(const char *way);
void vsock(const char *way);
