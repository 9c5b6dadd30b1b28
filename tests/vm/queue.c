/* nft's `queue` statement on kernels without it, for tests: iptables' target NFQUEUE, which such kernels may have, takes its
 * place in the very same rule (nft_compat), and is shown as `queue` again.
 *
 * Loaded into nft before libnftnl (ld.so.preload), whose expressions nft builds and reads through the functions below.
 * Numbers and structures: libnftnl/expr.h, linux/netfilter/xt_NFQUEUE.h. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct nftnl_expr;

enum { NAME = 0 };                                    /* of any expression */
enum { TARGET_NAME = 1, TARGET_REVISION, TARGET_INFO }; /* of a target of iptables' */
enum { QUEUE_NUMBER = 1, QUEUE_TOTAL, QUEUE_FLAGS };  /* of nft's queue */
enum { REVISION = 3 };

/* struct xt_NFQ_info_v3: queues from `number` on, so many; a flag says what nft's `bypass` does. */
struct nfqueue {
    uint16_t number, total, flags;
};

static void *next(const char *function)
{
    /* By the library's name: a program that loads nft's library late has it in no scope that RTLD_NEXT looks through. */
    static void *library;
    if (!library && !(library = dlopen("libnftnl.so.11", RTLD_LAZY)))
        abort();
    return dlsym(library, function);
}

typedef struct nftnl_expr *alloc_function(const char *);
typedef const char *name_function(const struct nftnl_expr *, uint16_t);
typedef const void *get_function(const struct nftnl_expr *, uint16_t, uint32_t *);
typedef int set_function(struct nftnl_expr *, uint16_t, const void *, uint32_t);
typedef bool is_set_function(const struct nftnl_expr *, uint16_t);
typedef uint16_t get_u16_function(const struct nftnl_expr *, uint16_t);
typedef void set_u16_function(struct nftnl_expr *, uint16_t, uint16_t);

/* What an expression says as a target NFQUEUE; NULL if it is anything else. */
static struct nfqueue *nfqueue(const struct nftnl_expr *expression)
{
    name_function *name = next("nftnl_expr_get_str");
    const char *kind = name(expression, NAME), *target;
    if (!kind || strcmp(kind, "target") || !(target = name(expression, TARGET_NAME)) || strcmp(target, "NFQUEUE"))
        return NULL;
    uint32_t length = 0;
    const void *info = ((get_function *)next("nftnl_expr_get"))(expression, TARGET_INFO, &length);
    return length < sizeof(struct nfqueue) ? NULL : (struct nfqueue *)info;
}

static uint16_t *field(struct nfqueue *queue, uint16_t attribute)
{
    switch (attribute) {
    case QUEUE_NUMBER: return &queue->number;
    case QUEUE_TOTAL: return &queue->total;
    case QUEUE_FLAGS: return &queue->flags;
    default: return NULL;
    }
}

struct nftnl_expr *nftnl_expr_alloc(const char *name)
{
    alloc_function *alloc = next("nftnl_expr_alloc");
    if (strcmp(name, "queue"))
        return alloc(name);
    set_function *set = next("nftnl_expr_set");
    uint32_t revision = REVISION;
    /* libnftnl keeps it, and frees it; the kernel wants a multiple of eight bytes. */
    struct nfqueue *queue = calloc(1, 8);
    struct nftnl_expr *expression = alloc("target");
    if (!queue || !expression)
        abort();
    queue->total = 1;
    set(expression, TARGET_NAME, "NFQUEUE", sizeof "NFQUEUE");
    set(expression, TARGET_REVISION, &revision, sizeof revision);
    set(expression, TARGET_INFO, queue, 8);
    return expression;
}

void nftnl_expr_set_u16(struct nftnl_expr *expression, uint16_t attribute, uint16_t value)
{
    struct nfqueue *queue = nfqueue(expression);
    uint16_t *place = queue ? field(queue, attribute) : NULL;
    if (place)
        *place = value;
    else
        ((set_u16_function *)next("nftnl_expr_set_u16"))(expression, attribute, value);
}

uint16_t nftnl_expr_get_u16(const struct nftnl_expr *expression, uint16_t attribute)
{
    struct nfqueue *queue = nfqueue(expression);
    uint16_t *place = queue ? field(queue, attribute) : NULL;
    return place ? *place : ((get_u16_function *)next("nftnl_expr_get_u16"))(expression, attribute);
}

bool nftnl_expr_is_set(const struct nftnl_expr *expression, uint16_t attribute)
{
    struct nfqueue *queue = attribute == NAME ? NULL : nfqueue(expression);
    return queue ? field(queue, attribute) != NULL : ((is_set_function *)next("nftnl_expr_is_set"))(expression, attribute);
}

const char *nftnl_expr_get_str(const struct nftnl_expr *expression, uint16_t attribute)
{
    if (attribute == NAME && nfqueue(expression))
        return "queue";
    return ((name_function *)next("nftnl_expr_get_str"))(expression, attribute);
}
